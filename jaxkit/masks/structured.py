"""Structured masks: whole units of axes, and the smaller model without them."""

import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxkit import tree
from jaxkit.trace.apply import take
from jaxkit.trace.names import (
    Axis,
    lay_out,
    members,
    named,
    nearest,
    pairs,
    resolve,
)

__all__ = ["Shrunk", "shrink", "units"]

UnitMask = Mapping[str, Bool[Array, " units"]]


class Shrunk(NamedTuple):
    """What `shrink` did; ``print`` it for a table.

    axes: (units before, units after) by name of axis, for those that lost some.
    leaves: (shape before, shape after) by path, for those that changed.
    entries: the number of entries in all leaves, before and after.
    """

    axes: dict[str, tuple[int, int]]
    leaves: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    entries: tuple[int, int]

    def __str__(self) -> str:
        shape = lambda sizes: "x".join(map(str, sizes))
        rows = [(name, f"{a} units", f"{b} units") for name, (a, b) in self.axes.items()]
        rows += [(path, shape(a), shape(b)) for path, (a, b) in self.leaves.items()]
        rows.append(("all entries", f"{self.entries[0]:,}", f"{self.entries[1]:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {a:>{widths[1]}} -> {b:>{widths[2]}}" for name, a, b in rows
        )


def _known(axes: PyTree, unit_mask: UnitMask) -> dict[str, Axis]:
    known = named(axes)
    for name, mask in unit_mask.items():
        if name not in known:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, known)}")
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"axis {name!r}: the mask is {jnp.result_type(mask)}, and bool was due")
        if np.shape(mask) != (known[name].size,):
            raise ValueError(
                f"axis {name!r} has size {known[name].size}, and its mask the shape "
                f"{np.shape(mask)}"
            )
    return known


def units(params: PyTree, unit_mask: UnitMask, axes: PyTree) -> PyTree[Bool[Array, "..."]]:
    """Turn a mask over units into a mask over entries: False wherever a removed unit has a part.

    An entry is kept if every unit it belongs to is kept: a kernel between two axes loses the
    rows of one and the columns of the other. Along a product of axes an entry belongs to one unit
    of each factor, along a concatenation to those of its block.

    Args:
      params: a tree of arrays, or of their shapes.
      unit_mask: a boolean vector by name of axis, True for the units to keep. It may be traced.
      axes: the axes tree of params; names may be plain strings.

    Returns:
      A mask tree: boolean arrays of the shapes of the leaves, all True where no unit is removed.

    Raises:
      ValueError: an unknown axis, or a mask of another size.
      TypeError: a mask that is not boolean.

    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    >>> axes = {"w": (None, "hidden"), "b": ("hidden",)}
    >>> units(params, {"hidden": np.array([True, False, True])}, axes)["w"]
    Array([[ True, False,  True],
           [ True, False,  True]], dtype=bool)
    """
    axes = resolve(params, axes)
    _known(axes, unit_mask)
    if tree.concrete(unit_mask):
        unit_mask = jax.tree.map(np.asarray, dict(unit_mask))
    out = []
    for _, leaf, entries in pairs(params, axes):
        mask = np.ones(np.shape(leaf), bool)
        for d, entry in enumerate(entries):
            if any(a.name in unit_mask for a in members(entry)):
                shape = [-1 if i == d else 1 for i in range(mask.ndim)]
                kept = lay_out(entry, unit_mask, operator.and_, np.True_)
                mask = mask & kept.reshape(shape)
        out.append(jnp.asarray(mask))
    return jax.tree.unflatten(jax.tree.structure(params), out)


def shrink(
    params: PyTree, unit_mask: UnitMask, axes: PyTree, *, same_constants: bool = False
) -> tuple[PyTree, dict[str, int], Shrunk]:
    """Drop masked units: smaller arrays that compute what the masked model computes.

    The masked model is `masks.apply(params, units(params, unit_mask, axes))`, in which every entry
    of a removed unit is zero, in the leaves that produce it and in those that consume it. On
    axes that are removable (nothing in `Axis.pinned`), dropping the zeros changes no output.

    The module has to be rebuilt with `sizes`. It is the same function only if it multiplies by
    the same constants. Where one looks as if it was computed from the size of an axis
    (`Axis.scaled`: the 1 / sqrt(size) of attention, recognized where a constant next to a sum over
    the axis is a power of its size), a rebuilt module would compute another: `shrink` refuses,
    unless `same_constants` says that the constant is kept or was no such thing.

    Args:
      params: a tree of arrays.
      unit_mask: a boolean vector by name of axis, True for the units to keep. Its values choose
        shapes: it cannot be traced.
      axes: the axes tree of params, from `trace.axes`. By hand nothing is pinned or scaled, and
        the promise is the writer's.
      same_constants: go on where a constant looks computed from a size.

    Returns:
      The smaller params, `sizes` (the number of units kept of each axis in `unit_mask`), and a
      report.

    Raises:
      ValueError: an unknown axis, a mask of another size, an axis that would be left without
        units, or one that is not removable (with the operations that forbid it).
      TypeError: a mask that is not boolean.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
    >>> axes = {"w": (None, "hidden"), "v": ("hidden", None)}
    >>> small, sizes, report = shrink(params, {"hidden": np.array([True, False, True])}, axes)
    >>> small["w"].shape, sizes
    ((2, 2), {'hidden': 2})
    >>> print(report)
    hidden       3 units -> 2 units
    v                3x1 ->     2x1
    w                2x3 ->     2x2
    all entries        9 ->       6

    References:
      Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning (arXiv:2301.12900), which
      groups the parameters that have to be pruned together by rules for the layers of one library.
    """
    axes = resolve(params, axes)
    known = _known(axes, unit_mask)
    keep = {}
    for name, mask in unit_mask.items():
        axis, mask = known[name], np.asarray(mask)
        if not mask.any():
            raise ValueError(f"axis {name!r}: all of its {axis.size} units are masked")
        if mask.all():
            continue
        if axis.pinned:
            raise ValueError(f"axis {name!r} is not removable: {'; '.join(axis.pinned)}")
        if axis.scaled and not same_constants:
            raise ValueError(
                f"axis {name!r}: a smaller module would compute another constant: "
                f"{'; '.join(axis.scaled)}. If yours keeps it, pass same_constants=True"
            )
        keep[name] = np.flatnonzero(mask)
    small = take(params, axes, keep)
    before = {path: np.shape(leaf) for path, leaf, _ in pairs(params, axes)}
    shapes = dict(zip(before, map(np.shape, jax.tree.leaves(small)), strict=True))
    report = Shrunk(
        axes={name: (known[name].size, len(kept)) for name, kept in keep.items()},
        leaves={p: (before[p], shapes[p]) for p in before if before[p] != shapes[p]},
        entries=(_count(before), _count(shapes)),
    )
    sizes = {name: int(np.sum(mask)) for name, mask in unit_mask.items()}
    return small, sizes, report


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(s)) for s in shapes.values())
