"""What an entry of the zoo is, and the hand-made permutations that prove its count.

A *unit* of an axis owns some entries of some leaf dimensions. Within a model the sizes of the
dimensions identify them, so an axis is written down as `{size of a dimension: indices}`: row u of
the integer array `indices` (units, entries) lists where unit u lives along every leaf dimension
of that size. `whole`, `merged` and `blocks` write these arrays.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import tree

Layout = dict[str, dict[int, np.ndarray]]
Groups = dict[str, list[tuple[str, int]]]


class Model(NamedTuple):
    """A model whose free axes were counted by hand.

    build: `build() -> (apply_fn, params, args)`, apply_fn(params, *args) -> output. Its keyword
      arguments are the sizes of the axes, under the names of `layout`: `build(hidden=4)` makes
      the model that has one unit less, with the same constants (attention scale).
    free: sorted sizes of all axes that can be permuted and leave the output alone, whatever
      the values of the params. An axis of size 1 has nothing to permute and does not count.
      An axis is one permutation, shared by all heads, experts, groups and stacked layers.
    removable: sorted sizes of the free axes of which a unit may be cut: zeroing all its entries
      and removing them give the same output. What counts is the operations along the axis: sums
      and element-wise functions, not a mean, softmax, maximum or normalization. A scalar that
      Python computed from the size (the attention's 1 / sqrt(size)) is a constant of the graph
      and stays what it was when the axis is cut.
    layout: where the units of every free axis live.
    only: for axes that share their size with another: the leaves they live on, by substring.
    """

    name: str
    build: Callable[..., tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    free: tuple[int, ...]
    removable: tuple[int, ...]
    layout: Layout
    only: dict[str, tuple[str, ...]] = {}  # noqa: RUF012


def whole(*sizes: int) -> dict[int, np.ndarray]:
    """Dimensions that are the axis and nothing else."""
    return {n: np.arange(n)[:, None] for n in sizes}


def merged(split: tuple[int, ...], at: int) -> dict[int, np.ndarray]:
    """A merged dimension of sizes `split`, whose factor `at` is the axis."""
    return blocks(math.prod(split), (0, split, at))


def blocks(total: int, *parts: tuple[int, tuple[int, ...], int]) -> dict[int, np.ndarray]:
    """A concatenated dimension; the axis lives in the blocks (start, split, at)."""

    def units(start, split, at):
        index = start + np.arange(math.prod(split)).reshape(split)
        return np.moveaxis(index, at, 0).reshape(split[at], -1)

    return {total: np.concatenate([units(*p) for p in parts], axis=1)}


def groups(params: Any, model: Model) -> Groups:
    """The (path, dimension) pairs of every axis."""

    def lives_on(axis, path):
        return any(part in path for part in model.only.get(axis, [""]))

    leaves = tree.flatten(params)
    return {
        axis: [
            (path, dim)
            for path, x in leaves.items()
            for dim, n in enumerate(x.shape)
            if n in where and lives_on(axis, path)
        ]
        for axis, where in model.layout.items()
    }


def permute(params: Any, members: list[tuple[str, int]], where, permutation) -> Any:
    """Reorder the units of one axis on the given dimensions."""

    def gather(x, dim):
        units = where[x.shape[dim]]
        index = np.arange(x.shape[dim])
        index[units] = units[permutation]
        return np.take(x, index, axis=dim)

    return _edit(params, members, gather)


def zero(params: Any, members: list[tuple[str, int]], where, unit: int) -> Any:
    """Set all entries of one unit to zero."""

    def clear(x, dim):
        keep = np.ones(x.shape[dim], bool)
        keep[where[x.shape[dim]][unit]] = False
        return x * keep.reshape([-1 if d == dim else 1 for d in range(x.ndim)])

    return _edit(params, members, clear)


def cut(params: Any, members: list[tuple[str, int]], where, unit: int) -> Any:
    """Remove all entries of one unit: smaller arrays."""
    return _edit(params, members, lambda x, dim: np.delete(x, where[x.shape[dim]][unit], axis=dim))


def _edit(params, members, change):
    leaves = {path: np.asarray(x) for path, x in tree.flatten(params).items()}
    for path, dim in members:
        leaves[path] = change(leaves[path], dim)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def randomize(params: Any, seed: int = 0) -> Any:
    """Fill every float leaf with values that hide no error: no zeros, no equal gains."""
    rng = np.random.default_rng(seed)
    leaves = []
    for path, x in tree.flatten(params).items():
        name, shape = path.rsplit("/", 1)[-1], tuple(x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            leaves.append(x)
            continue
        noise = rng.standard_normal(shape)
        if name == "var":
            value = 0.5 + rng.random(shape)
        elif name in ("scale", "gain") or (name == "weight" and len(shape) == 1):
            value = 1 + 0.3 * noise
        elif len(shape) < 2:
            value = 0.3 * noise
        else:
            value = max(0.2, math.prod(shape[:-1]) ** -0.5) * noise
        leaves.append(jnp.asarray(value, jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def draw(shapes: Any, seed: int = 0) -> Any:
    """Random leaves for a nested dict of shapes."""
    structs = jax.tree.map(
        lambda s: np.empty(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return randomize(structs, seed)


def batch(*shape: int) -> Any:
    """Random inputs."""
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


def ids(vocab: int, *shape: int) -> Any:
    """Random tokens."""
    return jnp.asarray(np.random.default_rng(7).integers(0, vocab, shape), jnp.int32)
