"""Packed masks: one bit an entry, for checkpoints and for sending."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt8

from jaxkit import tree
from jaxkit.masks.select import Mask

__all__ = ["pack", "unpack"]


def pack(mask: Mask) -> PyTree[UInt8[Array, " bytes"]]:
    """Store a mask in ceil(n / 8) bytes a leaf, the first entry in the highest bit.

    An array of bools takes a byte an entry. Leaves that are not boolean arrays stay as they are.

    Args:
      mask: a tree of boolean arrays.

    Returns:
      A tree of uint8 vectors, plain arrays for any checkpoint. The shapes are those of the params,
      which `unpack` asks for.

    >>> mask = {"w": jnp.array([[True, False, True], [False, False, True]])}
    >>> pack(mask)["w"].tolist()
    [164]
    """
    is_mask = lambda m: tree.is_array(m) and m.dtype == jnp.bool_
    return jax.tree.map(lambda m: jnp.packbits(m) if is_mask(m) else m, mask)


def unpack(packed: PyTree[UInt8[Array, " bytes"]], like: PyTree) -> Mask:
    """Return the mask that was packed.

    Args:
      packed: what `pack` returned.
      like: any tree of its structure and shapes: params, the mask, or ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: trees that differ, or a leaf of another number of bytes, named.
      TypeError: a leaf that is not uint8.

    >>> unpack({"w": jnp.array([164], jnp.uint8)}, {"w": jnp.zeros((2, 3))})["w"].tolist()
    [[True, False, True], [False, False, True]]
    """
    if jax.tree.structure(packed) != jax.tree.structure(like):
        tree.check_like(like, packed, "packed mask")

    def leaf(path: str, bits: Any, like: Any) -> Any:
        if not tree.is_array(like):
            return bits
        size = math.prod(like.shape)
        if jnp.result_type(bits) != jnp.uint8:
            raise TypeError(f"{path!r} is {jnp.result_type(bits)}, and packed bits are uint8")
        if jnp.shape(bits) != (due := (-(-size // 8),)):
            raise ValueError(
                f"{path!r} has {jnp.shape(bits)} bytes, and {due} are due for {like.shape}"
            )
        return jnp.unpackbits(bits, count=size).astype(bool).reshape(like.shape)

    return jax.tree.map(leaf, tree.paths(packed), packed, like)
