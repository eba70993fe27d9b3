"""jaxkit: research on neural-network weights in JAX, as pure functions on pytrees."""

from jaxkit import tree

__all__ = ["tree"]
