"""An axes tree: which dimensions of which leaves are the same axis, in names.

The tree has the structure of params; each leaf is a tuple with one entry per dimension: ``None``
(fixed), an `Axis`, a `Prod` or a `Concat`. `jaxkit.trace.axes` reads it off a function; it may as
well be written by hand, with plain strings for axes, whose sizes then follow from the shapes.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxkit import tree

__all__ = ["Axis", "Concat", "Entry", "Prod", "named", "rename", "resolve"]


@dataclass(frozen=True)
class Axis:
    """An axis: a permutation of its `size` units changes nothing.

    name: the same name on several dimensions means that they move together.
    size: the number of units.
    pinned: the operations that forbid to remove units, each with the user's source line. With
      none, a model whose leaf entries are zero for some units computes what the model without
      these units computes.
    scaled: the places where a constant looks as if it was computed from the size, as the
      1 / sqrt(size) of attention. The model without some units is right with the constant it had.
    """

    name: str
    size: int
    pinned: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prod:
    """A dimension that merges several axes, row-major: heads x size.

    A part is an `Axis`, its name, a `Concat`, or an integer: a factor of this size that is fixed.
    """

    parts: "tuple[Entry, ...]"


@dataclass(frozen=True)
class Concat:
    """A dimension that is a row of blocks: q | k | v, or the two halves of a gated unit.

    A part is an `Axis`, its name, a `Prod`, or an integer: a block of this size that is fixed.
    """

    parts: "tuple[Entry, ...]"


Entry = Axis | Prod | Concat | str | int | None


def members(entry: Entry) -> list[Axis]:
    """Return the axes in an entry of a resolved axes tree."""
    if isinstance(entry, Axis):
        return [entry]
    return [a for p in getattr(entry, "parts", ()) for a in members(p)]


def size_of(entry: Entry) -> int:
    """Return the number of positions that an entry of a resolved axes tree describes."""
    if isinstance(entry, Axis):
        return entry.size
    if isinstance(entry, Prod):
        return int(np.prod([size_of(p) for p in entry.parts]))
    if isinstance(entry, Concat):
        return sum(size_of(p) for p in entry.parts)
    assert isinstance(entry, int)
    return entry


def lay_out(entry: Entry, values: Mapping[str, Any], join: Callable[..., Any], neutral: Any) -> Any:
    """Lay values of units along a dimension: what each of its positions gets.

    A position in a product belongs to a unit of each factor, and gets their values joined; axes
    without values, and what is fixed, give `neutral` (of the dtype due). On the host if all are.
    """
    if isinstance(entry, Axis):
        return values.get(entry.name, np.full(entry.size, neutral))
    if isinstance(entry, Prod | Concat):
        parts = [lay_out(part, values, join, neutral) for part in entry.parts]
        if isinstance(entry, Prod):
            return reduce(lambda x, y: join(x[:, None], y[None, :]).reshape(-1), parts)
        host = all(isinstance(part, np.ndarray) for part in parts)
        return (np if host else jnp).concatenate(parts)
    return np.full(size_of(entry), neutral)


def pairs(params: PyTree, axes: PyTree) -> list[tuple[str, Any, tuple[Entry, ...]]]:
    """Return the (path, leaf, entries) of every leaf.

    Raises:
      ValueError: the trees differ, or a leaf has another number of dimensions than entries.
      TypeError: what stands for a leaf is no tuple.
    """
    leaves = tree.flatten(params)
    structure = jax.tree.structure(params)
    try:
        entries = structure.flatten_up_to(axes)
    except ValueError as error:
        raise ValueError(f"the axes tree has not the structure of params: {error}") from None
    out = []
    for (path, leaf), entry in zip(leaves.items(), entries, strict=True):
        if not isinstance(entry, tuple):
            raise TypeError(f"{path!r}: axes has a {type(entry).__name__}, and a tuple was due")
        if len(entry) != np.ndim(leaf):
            raise ValueError(
                f"{path!r}: axes has {len(entry)} entries for the shape {np.shape(leaf)}"
            )
        out.append((path, leaf, entry))
    return out


def _change(entry: Entry, fn: Callable[[Axis | str], Entry]) -> Entry:
    if isinstance(entry, Prod | Concat):
        return replace(entry, parts=tuple(_change(p, fn) for p in entry.parts))
    return fn(entry) if isinstance(entry, Axis | str) else entry


def _change_tree(axes: PyTree, fn: Callable[[Axis | str], Entry]) -> PyTree:
    is_leaf = lambda x: isinstance(x, tuple) and all(e is None or isinstance(e, Entry) for e in x)
    return jax.tree.map(lambda t: tuple(_change(e, fn) for e in t), axes, is_leaf=is_leaf)


def resolve(params: PyTree, axes: PyTree) -> PyTree:
    """Return the axes tree with an `Axis` of known size for every name.

    Raises:
      ValueError: the tree contradicts the shapes (the path, the axis and both sizes are named),
        or a size cannot be told.
      TypeError: an entry that is none of `None`, a name, `Axis`, `Prod`, `Concat`.

    >>> params = {"q": np.ones((3, 8)), "o": np.ones((4, 2, 3))}
    >>> axes = {"q": (None, Prod(("heads", "size"))), "o": ("heads", "size", None)}
    >>> resolve(params, axes)["q"][1].parts[0]
    Axis(name='heads', size=4, pinned=(), scaled=())
    """
    leaves = pairs(params, axes)
    sizes: dict[str, int] = {}
    todo = [
        (f"{path!r}, dimension {d}", e, np.shape(leaf)[d])
        for path, leaf, entries in leaves
        for d, e in enumerate(entries)
        if e is not None
    ]
    while todo:
        rest = [item for item in todo if not _match(*item, sizes)]
        if len(rest) == len(todo):
            at, entry, n = rest[0]
            raise ValueError(f"{at}: the sizes of the axes in {entry} do not follow from size {n}")
        todo = rest
    done = {}
    for path, _, entries in leaves:
        to_axis = lambda a: Axis(a, sizes[a]) if isinstance(a, str) else a
        done[path] = tuple(_change(e, to_axis) for e in entries)
    return jax.tree.unflatten(jax.tree.structure(params), list(done.values()))


def _known(entry: Entry, sizes: Mapping[str, int]) -> int | None:
    if isinstance(entry, bool) or not isinstance(entry, Axis | Prod | Concat | str | int):
        raise TypeError(f"{entry!r} in an axes tree is no name, Axis, Prod, Concat or size")
    if isinstance(entry, int):
        return entry
    if isinstance(entry, Axis | str):
        return sizes.get(entry if isinstance(entry, str) else entry.name)
    parts = [_known(p, sizes) for p in entry.parts]
    if any(p is None for p in parts):
        return None
    return int(np.prod(parts)) if isinstance(entry, Prod) else sum(parts)  # type: ignore


def _match(at: str, entry: Entry, n: int, sizes: dict[str, int]) -> bool:
    """Learn sizes from an entry that describes `n` positions; False if it is not yet settled."""
    if isinstance(entry, Axis) and sizes.setdefault(entry.name, entry.size) != entry.size:
        raise ValueError(
            f"{at}: axis {entry.name!r} has size {entry.size}, "
            f"and elsewhere in the axes tree {sizes[entry.name]}"
        )
    if isinstance(entry, Prod | Concat):
        for p in entry.parts:
            if isinstance(p, Axis | Prod | Concat) and _known(p, sizes) is None:
                _match(at, p, p.size if isinstance(p, Axis) else -1, sizes)
    have = _known(entry, sizes)
    if have is not None:
        if n not in (-1, have):
            raise ValueError(f"{at}: {_spell(entry)} has size {have}, the dimension {n}")
        return True
    if n == -1:
        return False
    if isinstance(entry, str):
        sizes[entry] = n
        return True
    assert isinstance(entry, Prod | Concat)
    known = [_known(p, sizes) for p in entry.parts]
    unknown = [p for p, k in zip(entry.parts, known, strict=True) if k is None]
    settled = [k for k in known if k is not None]
    if isinstance(entry, Prod):
        rest, left = int(np.prod(settled)), 0
        if len(unknown) == 1:
            rest, left = divmod(n, rest) if rest else (0, 1)
    else:
        rest, left = n - sum(settled), 0
        if len(set(unknown)) == 1:
            rest, left = divmod(rest, len(unknown))
    if len(set(unknown)) > 1 or (isinstance(entry, Prod) and len(unknown) > 1):
        return False
    if left or rest <= 0:
        raise ValueError(f"{at}: {_spell(entry)} does not make up the dimension's size {n}")
    return _match(at, unknown[0], rest, sizes)


def _spell(entry: Entry) -> str:
    if isinstance(entry, Axis | str):
        return f"axis {entry if isinstance(entry, str) else entry.name!r}"
    return str(entry)


def named(axes: PyTree) -> dict[str, Axis]:
    """Return the axes of a resolved axes tree by name, in the order in which they appear.

    >>> named({"w": (Axis("x", 3), Prod((Axis("y", 2), 2)))})
    {'x': Axis(name='x', size=3, pinned=(), scaled=()),
     'y': Axis(name='y', size=2, pinned=(), scaled=())}
    """
    out: dict[str, Axis] = {}

    def visit(a: Axis | str) -> Entry:
        if isinstance(a, str):
            raise TypeError(f"the size of axis {a!r} is not known: resolve the axes tree first")
        out.setdefault(a.name, a)
        return a

    _change_tree(axes, visit)
    return out


def nearest(name: str, names: Iterable[str]) -> str:
    """Say which names are like one that does not exist."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return ", ".join(map(repr, near)) or "none: no axis is free"


def rename(axes: PyTree, names: Mapping[str, str]) -> PyTree:
    """Return the axes tree with axes renamed.

    Args:
      axes: an axes tree.
      names: new names by old names.

    Raises:
      ValueError: a name that the tree does not have, or two axes that would share a name.

    >>> rename({"w": (None, Axis("w:1", 3))}, {"w:1": "mlp"})
    {'w': (None, Axis(name='mlp', size=3, pinned=(), scaled=()))}
    """
    present: dict[str, None] = {}
    spell = lambda a: a if isinstance(a, str) else a.name
    _change_tree(axes, lambda a: present.setdefault(spell(a)) or a)
    for name in names:
        if name not in present:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, present)}")
    taken: dict[str, str] = {}
    for name in present:
        other = taken.setdefault(names.get(name, name), name)
        if other != name:
            raise ValueError(f"axes {other!r} and {name!r} would both be {names.get(name, name)!r}")

    def change(a: Axis | str) -> Entry:
        new = names.get(spell(a), spell(a))
        return new if isinstance(a, str) else replace(a, name=new)

    return _change_tree(axes, change)
