"""Masked matrices in formats that leave the zeros out, to store and to multiply.

What they are worth has to be measured (``python -m experiments run sparse-speed``). On a CPU, at a
batch of 64 and a side of 1024, blocks of 32 x 32 were faster than the dense product from about half
zeros on, BCSR from about three quarters, BCOO from 99 % only and hundreds of times slower at half;
2:4 took 1.5 times the dense time and 5/8 of the memory. Whole units (`masks.shrink`) are the best
bargain, for what is left is a smaller dense model.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxkit import tree

__all__ = [
    "BlockSparse",
    "NOfM",
    "pack_blocks",
    "pack_n_of_m",
    "sparse_matmul",
    "to_bcoo",
    "to_bcsr",
    "to_dense",
]

_data = jax.tree_util.register_dataclass


@functools.partial(_data, data_fields=["values", "rows", "columns"], meta_fields=["shape"])
@dataclass(frozen=True)
class BlockSparse:
    """The blocks of a matrix that hold anything, column by column of blocks.

    values: the blocks.
    rows, columns: where they lie, counted in blocks.
    shape: of the matrix.
    """

    values: Float[Array, "live a b"]
    rows: Int[Array, " live"]
    columns: Int[Array, " live"]
    shape: tuple[int, int]


@functools.partial(_data, data_fields=["values", "places"], meta_fields=["m"])
@dataclass(frozen=True)
class NOfM:
    """A matrix with at most n of every m consecutive inputs of an output.

    values: the n entries of each group, 0 where there are fewer.
    places: where each lies in its group, 0 ... m - 1.
    m: the size of a group.
    """

    values: Float[Array, "groups n out"]
    places: UInt8[Array, "groups n out"]
    m: int


def _check(w: Any, mask: Any, what: str) -> None:
    if w.ndim != 2:
        raise ValueError(f"a matrix was due, and an array of shape {w.shape} came")
    if mask.shape != w.shape:
        raise ValueError(f"the mask has shape {mask.shape}, and {w.shape} was due")
    if not tree.concrete(mask):
        raise TypeError(f"{what} needs the values of the mask, which choose shapes: not under jit")


def to_bcoo(w: Float[Array, "in out"], mask: Bool[Array, "in out"]) -> sparse.BCOO:
    """Return the entries under the mask as ``jax.experimental.sparse.BCOO``, row by row.

    All entries under the mask are stored, those that happen to be 0 too. ``x @ to_bcoo(w, mask)``
    is ``x @ where(mask, w, 0)`` up to rounding, also under jit with the result as an argument.

    Raises:
      ValueError: no matrix, or a mask of another shape.
      TypeError: a mask without values (under jit).

    >>> m = to_bcoo(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [False, True]]))
    >>> m.nse, (jnp.ones((1, 2)) @ m).tolist()
    (2, [[1.0, 4.0]])
    """
    _check(w, mask, "to_bcoo")
    places = np.argwhere(np.asarray(mask)).astype(np.int32)
    values = jnp.asarray(w)[places[:, 0], places[:, 1]]
    return sparse.BCOO(
        (values, jnp.asarray(places)), shape=w.shape, indices_sorted=True, unique_indices=True
    )


def to_bcsr(w: Float[Array, "in out"], mask: Bool[Array, "in out"]) -> sparse.BCSR:
    """Return the entries under the mask as ``jax.experimental.sparse.BCSR``; see `to_bcoo`.

    JAX multiplies it from the left alone: ``(to_bcsr(w.T, mask.T) @ x.T).T``.

    >>> to_bcsr(jnp.ones((2, 2)), jnp.array([[True, False], [True, True]])).indptr.tolist()
    [0, 1, 3]
    """
    return sparse.BCSR.from_bcoo(to_bcoo(w, mask))


def pack_blocks(
    w: Float[Array, "in out"], mask: Bool[Array, "in out"], block: tuple[int, int]
) -> BlockSparse:
    """Store the blocks in which the mask has a True entry; `sparse_matmul` multiplies only those.

    Entries of a stored block that are outside the mask are zero. The mask should have been made of
    blocks (`masks.blocks`): scattered entries leave hardly a block empty.

    Args:
      w: a matrix.
      mask: which entries are there; its values choose shapes.
      block: the sides of a block.

    Raises:
      ValueError: blocks that do not divide the shape, no matrix, or a mask of another shape.
      TypeError: a mask without values (under jit).

    >>> mask = jnp.repeat(jnp.array([[True, False], [False, False]]), 2, 0).repeat(2, 1)
    >>> pack_blocks(jnp.arange(16.0).reshape(4, 4), mask, (2, 2)).values.tolist()
    [[[0.0, 1.0], [4.0, 5.0]]]
    """
    _check(w, mask, "pack_blocks")
    a, b = block
    if min(a, b) < 1 or w.shape[0] % a or w.shape[1] % b:
        raise ValueError(f"blocks of {a} x {b} do not divide the shape {w.shape}")
    cut = lambda x: x.reshape(w.shape[0] // a, a, w.shape[1] // b, b).swapaxes(1, 2)
    live = cut(np.asarray(mask)).any((2, 3))
    columns, rows = np.nonzero(live.T)
    values = cut(jnp.where(mask, w, 0))[rows, columns]
    place = lambda i: jnp.asarray(i, jnp.int32)
    return BlockSparse(values, place(rows), place(columns), (w.shape[0], w.shape[1]))


def pack_n_of_m(w: Float[Array, "in out"], mask: Bool[Array, "in out"], n: int, m: int) -> NOfM:
    """Store n of every m consecutive entries along the inputs: values and places of one byte.

    A float32 matrix takes 5 n / (4 m) of its memory (5/8 for 2:4). `sparse_matmul` first makes it
    dense: a processor with instructions for it is not assumed.

    Args:
      w: a matrix.
      mask: at most n of every m along the first axis are True (`masks.n_of_m`).
      n, m: the pattern, m at most 256.

    Raises:
      ValueError: a group with more entries, groups that do not divide the inputs, no matrix, or a
        mask of another shape.
      TypeError: a mask without values (under jit).

    >>> w = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> packed = pack_n_of_m(w, jnp.array([[False], [True], [False], [True]]), 2, 4)
    >>> packed.values.ravel().tolist(), packed.places.ravel().tolist()
    ([2.0, 4.0], [1, 3])
    """
    _check(w, mask, "pack_n_of_m")
    if not 1 <= n <= m <= 256 or w.shape[0] % m:
        raise ValueError(f"{n} of {m} does not divide the {w.shape[0]} inputs of {w.shape}")
    groups = lambda x: x.reshape(-1, m, w.shape[1])
    most = int(np.asarray(groups(mask)).sum(1).max(initial=0))
    if most > n:
        raise ValueError(f"a group of {m} has {most} entries under the mask, and {n} can be stored")
    places = jnp.argsort(~groups(mask), axis=1, stable=True)[:, :n]
    values = jnp.take_along_axis(groups(jnp.where(mask, w, 0)), places, axis=1)
    return NOfM(values, places.astype(jnp.uint8), m)


def to_dense(packed: BlockSparse | NOfM) -> Float[Array, "in out"]:
    """Return the matrix that was packed, zeros included.

    >>> mask = jnp.array([[True], [False]])
    >>> to_dense(pack_n_of_m(jnp.array([[7.0], [8.0]]), mask, 1, 2)).tolist()
    [[7.0], [0.0]]
    """
    if isinstance(packed, BlockSparse):
        (rows, columns), (_, a, b) = packed.shape, packed.values.shape
        grid = jnp.zeros((rows // a, columns // b, a, b), packed.values.dtype)
        grid = grid.at[packed.rows, packed.columns].set(packed.values)
        return grid.swapaxes(1, 2).reshape(rows, columns)
    here = packed.places[:, :, None] == jnp.arange(packed.m, dtype=jnp.uint8)[:, None]
    dense = jnp.where(here, packed.values[:, :, None], 0).sum(1)
    return dense.reshape(-1, dense.shape[-1])


def sparse_matmul(
    x: Float[Array, "*batch in"], packed: BlockSparse | NOfM
) -> Float[Array, "*batch out"]:
    """Return x W for a packed W.

    Of blocks, only those that are stored are multiplied: the slices of x that they read are
    gathered, and what comes out is summed by column. All shapes are fixed, and it differentiates
    with respect to x and the values. N:M is made dense first.

    Raises:
      ValueError: an x of another number of inputs.

    >>> packed = pack_blocks(jnp.eye(4), jnp.eye(4) > 0, (2, 2))
    >>> sparse_matmul(jnp.array([[1.0, 2.0, 3.0, 4.0]]), packed).tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    blocks = isinstance(packed, BlockSparse)
    inputs = packed.shape[0] if blocks else packed.values.shape[0] * packed.m
    if x.shape[-1] != inputs:
        raise ValueError(f"x has {x.shape[-1]} features, and the matrix {inputs} inputs")
    if not blocks:
        return x @ to_dense(packed)
    _, a, b = packed.values.shape
    slices = x.reshape(-1, inputs // a, a).swapaxes(0, 1)
    out = slices[packed.rows] @ packed.values
    out = jax.ops.segment_sum(out, packed.columns, packed.shape[1] // b, indices_are_sorted=True)
    return out.swapaxes(0, 1).reshape(*x.shape[:-1], packed.shape[1])
