"""Sub-networks of Transformers: spaces of them, what they cost, and searches in shared weights.

Layers are lists of axis names, ``layers = [("0/heads", "0/mlp"), ("1/heads", "1/mlp")]``, as
`trace.axes` finds them and `trace.rename` names them.

Reference: Klein, Golebiowski, Ma, Perrone, Archambeau, "Structural Pruning of Pre-trained Language
Models via Neural Architecture Search", arXiv:2405.02267.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.nested import Space, removable, subnet, uniform
from jaxkit.masks.structured import UnitMask
from jaxkit.trace.apply import positions
from jaxkit.trace.names import pairs, resolve

__all__ = [
    "Found",
    "entries",
    "hypervolume",
    "large",
    "layerwise",
    "local_search",
    "medium",
    "mutate",
    "pareto",
    "random_search",
    "small",
]

Layers = Sequence[Sequence[str]]

# ------------------------------------------------------------------------------------ spaces


def _box(low: Any, high: Any, masks: Callable) -> Space:
    low, high = np.array(low, int), np.array(high, int)
    return Space(low, high, lambda key: uniform(key, low, high), masks)


def _sizes(params: PyTree, layers: Layers, axes: PyTree) -> list[list[int]]:
    """Return the sizes of the axes, layer by layer."""
    if not layers or len({len(layer) for layer in layers}) != 1 or not layers[0]:
        raise ValueError(f"layers: as many axes in each, and at least one, are due, not {layers}")
    names = [name for layer in layers for name in layer]
    if len(set(names)) < len(names):
        raise ValueError(f"layers: an axis is named twice in {names}")
    found = removable(params, names, axes)
    return [[found[name] for name in layer] for layer in layers]


def small(params: PyTree, layers: Layers, axes: PyTree) -> Space:
    """Return the space of few numbers: the first l layers, the first h heads and u units in each.

    Args:
      params: a tree of arrays, or of their shapes.
      layers: per layer its axes; those in the same place have the same size in every layer.
      axes: the axes tree of params.

    Returns:
      A `Space` of vectors (l, h, u, ...), with l from 0 and the others from 1.

    Raises:
      ValueError: an unknown or not removable axis, or one in the place of another size.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> space = small(params, [["a"]], {"w": (None, "a"), "v": ("a", None)})
    >>> space.masks(jnp.array([1, 2]))["a"].tolist(), space.masks(jnp.array([0, 2]))["a"].tolist()
    ([True, True, False], [False, False, False])
    """
    sizes = _sizes(params, layers, axes)
    if any(row != sizes[0] for row in sizes):
        raise ValueError(f"the layers differ in size, {sizes}: `medium` counts each for itself")

    def masks(vector):
        return {
            name: (jnp.arange(n) < vector[1 + j]) & (i < vector[0])
            for i, layer in enumerate(layers)
            for j, (name, n) in enumerate(zip(layer, sizes[0], strict=True))
        }

    return _box([0, *[1] * len(sizes[0])], [len(layers), *sizes[0]], masks)


def medium(params: PyTree, layers: Layers, axes: PyTree) -> Space:
    """Return the space of a number for each axis: the first 0 ... size units, layer by layer.

    Args, raises: as for `small`, of any sizes.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> medium(params, [["a"]], {"w": (None, "a"), "v": ("a", None)}).high
    array([3])
    """
    flat = [n for row in _sizes(params, layers, axes) for n in row]
    names = [name for layer in layers for name in layer]

    def masks(vector):
        numbered = enumerate(zip(names, flat, strict=True))
        return {name: jnp.arange(n) < vector[i] for i, (name, n) in numbered}

    return _box([0] * len(flat), flat, masks)


def layerwise(params: PyTree, layers: Layers, axes: PyTree) -> Space:
    """Return the space of whole layers: a bit for each. Its smallest network has none of them.

    Args, raises: as for `small`, of any sizes.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> space = layerwise(params, [["a"]], {"w": (None, "a"), "v": ("a", None)})
    >>> space.masks(space.low)["a"].tolist()
    [False, False, False]
    """
    sizes = _sizes(params, layers, axes)

    def masks(vector):
        return {
            name: jnp.broadcast_to(vector[i] > 0, n)
            for i, (layer, row) in enumerate(zip(layers, sizes, strict=True))
            for name, n in zip(layer, row, strict=True)
        }

    return _box([0] * len(sizes), [1] * len(sizes), masks)


def large(params: PyTree, layers: Layers, axes: PyTree) -> Space:
    """Return the space of any subsets of units: a bit for each.

    Heads of all layers are drawn together, so are units of all layers: of K, 1 ... K - 1 go (a
    uniform number), at random.

    Args, raises: as for `small`, of any sizes.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> space = large(params, [["a"]], {"w": (None, "a"), "v": ("a", None)})
    >>> space.masks(jnp.array([0, 1, 1]))["a"].tolist()
    [False, True, True]
    """
    sizes = _sizes(params, layers, axes)
    kinds = list(zip(*sizes, strict=True))
    names = [name for kind in zip(*layers, strict=True) for name in kind]
    flat = [n for kind in kinds for n in kind]
    ends = np.cumsum(flat)

    def draw(key):
        parts = []
        for kind, k in zip(kinds, jax.random.split(key, len(kinds)), strict=True):
            total, (how_many, which) = sum(kind), jax.random.split(k)
            gone = jax.random.randint(how_many, (), min(1, total - 1), total)
            parts.append(jax.random.permutation(which, total) >= gone)
        return jnp.concatenate(parts).astype(int)

    def masks(vector):
        pieces = jnp.split(jnp.asarray(vector) > 0, ends[:-1])
        return dict(zip(names, pieces, strict=True))

    bits = np.ones(ends[-1], int)
    return Space(0 * bits, bits, draw, masks)


def mutate(key: PRNGKeyArray, space: Space, vector: Int[Array, " n"]) -> Int[Array, " n"]:
    """Change one number of a sub-network, chosen at random, to another one at random.

    Args:
      key: a typed key.
      space: what the sub-network belongs to; a number with a single value is never chosen.
      vector: the sub-network.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: a space of a single sub-network.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> space = layerwise(params, [["a"]], {"w": (None, "a"), "v": ("a", None)})
    >>> mutate(jax.random.key(0), space, space.low).tolist()
    [1]
    """
    tree.check_key(key)
    (free,) = np.nonzero(space.high > space.low)
    if not len(free):
        raise ValueError("the space has a single sub-network: nothing can change")
    which, what = jax.random.split(key)
    i = jax.random.choice(which, free)
    low, high = jnp.asarray(space.low)[i], jnp.asarray(space.high)[i]
    value = jax.random.randint(what, (), low, high)
    vector = jnp.asarray(vector)
    return vector.at[i].set(value + (value >= vector[i]))


# ---------------------------------------------------------------------------- what it is worth


def entries(
    params: PyTree,
    unit_mask: UnitMask,
    axes: PyTree,
    *,
    branches: Mapping[str, tree.Where] | None = None,
) -> int:
    """Count the entries of a sub-network: of the arrays that `shrink` makes.

    A leaf of a branch without units counts nothing. Everything else is counted as it is stored: the
    output projection of an attention layer shrinks with its heads.

    Args:
      params: a tree of arrays, or of their shapes.
      unit_mask: a boolean vector by name of axis; known values.
      axes: the axes tree of params.
      branches: as for `jaxkit.masks.nested.subnet`.

    Raises:
      ValueError, TypeError: as for `jaxkit.masks.nested.subnet`.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    >>> axes = {"w": (None, "a"), "v": ("a", None)}
    >>> entries(params, {"a": np.array([True, False, False])}, axes)
    4
    """
    axes = resolve(params, axes)
    jax.eval_shape(lambda: subnet(params, unit_mask, axes, branches=branches))  # its errors
    kept = {name: np.flatnonzero(np.asarray(mask)) for name, mask in unit_mask.items()}
    dead = {
        path
        for name, where in (branches or {}).items()
        if name in kept and not len(kept[name])
        for path in tree.chosen(params, where)
    }
    total = 0
    for path, leaf, dims in pairs(params, axes):
        if path not in dead:
            sizes = (
                n if e is None else len(positions(e, kept))
                for n, e in zip(np.shape(leaf), dims, strict=True)
            )
            total += int(np.prod([int(n) for n in sizes], dtype=object))
    return total


def pareto(points: Float[Array | np.ndarray, "n objectives"]) -> Bool[Array, " n"]:
    """Mark the points that no other dominates; all objectives are to be small (negate others).

    A point dominates another if it is nowhere larger and somewhere smaller. Of equal points the
    first is marked. NaN counts as infinity. O(n^2).

    Args:
      points: one row per candidate. Known ones are compared in float64, traced ones as they are
        (float32 cannot tell numbers of parameters apart beyond 2^24).

    Returns:
      True for the points of the front; at least one, if there is any point.

    >>> pareto(jnp.array([[1.0, 3.0], [2.0, 2.0], [2.0, 3.0], [1.0, 3.0]])).tolist()
    [True, True, False, False]
    """
    known = tree.concrete(points)
    points = np.asarray(points, np.float64) if known else jnp.asarray(points)
    xp: Any = np if known else jnp
    points = xp.where(xp.isnan(points), xp.inf, points)
    below = (points[:, None] <= points[None]).all(-1)  # [j, i]: j is nowhere larger than i
    first = xp.triu(xp.ones_like(below), 1)
    return jnp.asarray(~(below & (~below.T | first)).any(0))


def hypervolume(points: Float[Array, "n 2"], reference: Float[Array, "2"]) -> Float[Array, ""]:
    """Measure the area that points dominate, up to a reference point; both objectives are small.

    The area of the union of the rectangles between each point and the reference, by one sweep over
    the sorted points: for two objectives this is a closed form. To compare runs, give every
    objective its quantile over all runs first, and take (1, 1) as the reference.

    Args:
      points: one row per candidate; dominated ones and those beyond the reference add nothing.
      reference: the corner.

    Raises:
      ValueError: another number of objectives than two.

    >>> float(hypervolume(jnp.array([[1.0, 3.0], [2.0, 1.0]]), jnp.array([4.0, 4.0])))
    7.0

    Reference: Zitzler, Thiele, "Multiobjective Evolutionary Algorithms: A Comparative Case Study
    and the Strength Pareto Approach", IEEE Transactions on Evolutionary Computation 3(4), 1999.
    """
    if np.ndim(points) != 2 or np.shape(points)[1] != 2 or np.shape(reference) != (2,):
        raise ValueError(
            f"points (n, 2) and a reference (2,) are due, not {np.shape(points)} and "
            f"{np.shape(reference)}"
        )
    points, reference = jnp.asarray(points), jnp.asarray(reference)
    if not len(points):
        return jnp.zeros((), points.dtype)
    inside = jnp.minimum(points, reference)
    inside = inside[jnp.argsort(inside[:, 0])]
    height = reference[1] - jax.lax.cummin(inside[:, 1])
    return (jnp.diff(inside[:, 0], append=reference[0]) * height).sum()


# ------------------------------------------------------------------------------------ search


class Found(NamedTuple):
    """What a search evaluated, in order.

    vectors: the sub-networks, for `Space.masks`.
    points: their objectives.
    front: True for those that `pareto` marks.
    """

    vectors: Int[np.ndarray, "n d"]
    points: Float[np.ndarray, "n objectives"]
    front: Bool[np.ndarray, " n"]


Objective = Callable[[dict[str, Bool[Array, " units"]]], Sequence[float]]


def random_search(key: PRNGKeyArray, space: Space, objective: Objective, n: int) -> Found:
    """Evaluate n random sub-networks; the weights are shared, and none is trained again.

    Args:
      key: a typed key.
      space: what to search.
      objective: ``objective(unit_mask) -> numbers``, all to be small: the validation error and the
        `entries`. It runs on the host; jit what it evaluates.
      n: how many evaluations.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: n below 1.

    >>> params, axes = {"w": jnp.ones((2, 3))}, {"w": (None, "a")}
    >>> space = medium(params, [["a"]], axes)
    >>> found = random_search(jax.random.key(0), space, lambda u: (u["a"].sum(), 1), 5)
    >>> found.points.shape
    (5, 2)
    """
    tree.check_key(key)
    return _search(key, space, objective, n, lambda key, vectors, points: space.draw(key))


def local_search(
    key: PRNGKeyArray,
    space: Space,
    objective: Objective,
    n: int,
    *,
    start: Int[Array, " d"] | None = None,
) -> Found:
    """Search from the front: each candidate is a member of the current front with one `mutate`.

    Args:
      key, space, objective, n: as for `random_search`.
      start: the first candidate; default: a random one.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: n below 1, or a space of a single sub-network.

    >>> params, axes = {"w": jnp.ones((2, 3))}, {"w": (None, "a")}
    >>> space = medium(params, [["a"]], axes)
    >>> found = local_search(jax.random.key(0), space, lambda u: (u["a"].sum(), 1), 5)
    >>> int(found.front.sum()) >= 1
    True
    """
    tree.check_key(key)

    def propose(key, vectors, points):
        member, number = jax.random.split(key)
        row = jax.random.categorical(member, jnp.log(pareto(points)))
        return mutate(number, space, vectors[row])

    return _search(key, space, objective, n, propose, start)


def _search(
    key: PRNGKeyArray,
    space: Space,
    objective: Objective,
    n: int,
    propose: Callable[[PRNGKeyArray, Array, Array], Array],
    start: Any = None,
) -> Found:
    """Evaluate what `propose` makes of all rows so far; the rows to come are infinite points."""
    if n < 1:
        raise ValueError(f"n={n}: at least one evaluation is due")
    keys = jax.random.split(key, n)
    first = jax.jit(space.draw)(keys[0]) if start is None else start
    vectors = np.tile(np.asarray(first), (n, 1))
    masks, propose = jax.jit(space.masks), jax.jit(propose)
    points = np.zeros((n, 0))
    for i in range(n):
        if i:
            vectors[i] = propose(keys[i], vectors, points)
        values = [float(value) for value in objective(masks(vectors[i]))]
        if not i:
            points = np.full((n, len(values)), np.inf)
        points[i] = values
    return Found(vectors, points, np.asarray(pareto(points)))
