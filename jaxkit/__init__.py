"""jaxkit: research on neural-network weights in JAX, as pure functions on pytrees."""

from jaxkit import masks, tree

__all__ = ["masks", "tree"]
