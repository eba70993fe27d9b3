"""jaxkit: research on neural-network weights in JAX, as pure functions on pytrees."""

from jaxkit import init, masks, tree

__all__ = ["init", "masks", "tree"]
