"""Cut leaves along their axes: arrays each of whose dimensions is one axis, or fixed."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit.trace.names import Axis, Concat, Entry, Prod, pairs, resolve, size_of

__all__ = ["Block", "assemble", "blocks"]


class Block(NamedTuple):
    """A part of a leaf in which every dimension is one axis or fixed.

    Attributes:
      array: the entries.
      axes: for each dimension the name of its axis, or None.
      path: the leaf that it is a part of.
    """

    array: Array
    axes: tuple[str | None, ...]
    path: str = ""


def blocks(params: PyTree, axes: PyTree) -> dict[str, Block]:
    """Return the blocks that the leaves consist of, by path.

    A `Prod` becomes one dimension a factor, and a `Concat` one block a part, so that what is left
    to look at are arrays with one name a dimension: ``matmul`` over them compares units, a mean
    over one of their dimensions is over the units of an axis.

    Args:
      params: a tree of arrays.
      axes: its axes tree; names may be plain strings.

    Returns:
      {path: block}, and where a leaf is cut, {path[0], path[1], ...: block} in row-major order.

    Raises:
      ValueError, TypeError: an axes tree that contradicts the shapes.

    >>> cut = blocks({"qk": jnp.zeros((6, 8))}, {"qk": ("embed", Concat((Prod(("heads", 2)), 4)))})
    >>> {name: (block.array.shape, block.axes) for name, block in cut.items()}
    {'qk[0]': ((6, 2, 2), ('embed', 'heads', None)), 'qk[1]': ((6, 4), ('embed', None))}
    """
    out = {}
    for path, leaf, entries in pairs(params, resolve(params, axes)):
        pieces = list(cut(leaf, entries))
        for i, block in enumerate(pieces):
            out[path if len(pieces) == 1 else f"{path}[{i}]"] = block._replace(path=path)
    return out


def assemble(params: PyTree, axes: PyTree, parts: Mapping[str, Array]) -> PyTree:
    """Put the arrays of blocks together again: the inverse of `blocks`.

    Args:
      params: a tree with the structure and the shapes to come out.
      axes: its axes tree.
      parts: an array for each block. All may have further dimensions at the end (channels), which
        the leaves then have as well.

    Raises:
      ValueError: blocks that lack or are too many, or shapes that do not fit.

    >>> params, axes = {"w": jnp.arange(6.0)}, {"w": (Concat((Prod(("a", 2)), 2)),)}
    >>> parts = {name: block.array for name, block in blocks(params, axes).items()}
    >>> {name: part.tolist() for name, part in parts.items()}
    {'w[0]': [[0.0, 1.0], [2.0, 3.0]], 'w[1]': [4.0, 5.0]}
    >>> assemble(params, axes, parts)["w"].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    axes = resolve(params, axes)
    own = blocks(params, axes)
    if set(own) != set(parts):
        off = sorted(set(own) ^ set(parts))[0]
        raise ValueError(f"block {off!r} is {'missing' if off in own else 'none of these params'}")
    for name, block in own.items():
        shape = np.shape(block.array)
        if np.shape(parts[name])[: len(shape)] != shape:
            raise ValueError(f"block {name!r} is {np.shape(parts[name])}, and {shape} was due")
    rest = iter([parts[name] for name in own])
    leaves = [_join(rest, entries) for _, _, entries in pairs(params, axes)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def cut(x: Any, entries: tuple[Entry, ...]) -> Iterator[Block]:
    """Cut along the first dimension that is a product or a concatenation, and so on."""
    for d, entry in enumerate(entries):
        before, after = entries[:d], entries[d + 1 :]
        if isinstance(entry, Prod):
            sizes = [size_of(p) for p in entry.parts]
            split = x.reshape(*np.shape(x)[:d], *sizes, *np.shape(x)[d + 1 :])
            yield from cut(split, (*before, *entry.parts, *after))
            return
        if isinstance(entry, Concat):
            ends = np.cumsum([size_of(p) for p in entry.parts])[:-1]
            pieces = (np if isinstance(x, np.ndarray) else jnp).split(x, ends, d)
            for piece, part in zip(pieces, entry.parts, strict=True):
                yield from cut(piece, (*before, part, *after))
            return
    yield Block(x, tuple(e.name if isinstance(e, Axis) else None for e in entries))


def _join(rest: Iterator[Any], entries: tuple[Entry, ...]) -> Any:
    for d, entry in enumerate(entries):
        before, after = entries[:d], entries[d + 1 :]
        if isinstance(entry, Prod):
            x = _join(rest, (*before, *entry.parts, *after))
            end = d + len(entry.parts)
            size = int(np.prod(np.shape(x)[d:end], dtype=int))
            return x.reshape(*np.shape(x)[:d], size, *np.shape(x)[end:])
        if isinstance(entry, Concat):
            pieces = [_join(rest, (*before, part, *after)) for part in entry.parts]
            return jnp.concatenate(pieces, d)
    return next(rest)


def unit_rows(x: Array, axis: int, entry: Entry) -> list[tuple[str, Array]]:
    """Lay out the units of the axes that a dimension runs along: [(name, (units, n)), ...]."""
    flat = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return [
        (name, jnp.moveaxis(block.array, d, 0).reshape(block.array.shape[d], -1))
        for block in cut(flat, (entry, None))
        for d, name in enumerate(block.axes)
        if name is not None
    ]
