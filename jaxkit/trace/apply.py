"""Move along the axes of a model: permute units, take some of them, prove an axes tree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.trace.names import (
    Axis,
    Concat,
    Entry,
    Prod,
    members,
    named,
    nearest,
    pairs,
    resolve,
    size_of,
)

__all__ = ["check", "permute", "take"]


def positions(entry: Entry, indices: Mapping[str, Any]) -> Any:
    """Return where the chosen units of every axis lie along a dimension."""
    if isinstance(entry, Axis):
        return indices.get(entry.name, np.arange(entry.size))
    if isinstance(entry, Prod):
        out = np.zeros(1, np.int32)
        for part in entry.parts:
            inner = positions(part, indices)
            out = (out[:, None] * size_of(part) + inner[None, :]).reshape(-1)
        return out
    if isinstance(entry, Concat):
        starts = np.cumsum([0, *(size_of(p) for p in entry.parts)])
        moved = [positions(p, indices) + s for p, s in zip(entry.parts, starts[:-1], strict=True)]
        host = all(isinstance(m, np.ndarray) for m in moved)
        return (np if host else jnp).concatenate(moved)
    assert isinstance(entry, int)
    return np.arange(entry)


def take(
    params: PyTree, axes: PyTree, indices: Mapping[str, Int[Array | np.ndarray, " units"]]
) -> PyTree:
    """Take units of axes, in the given order, on every dimension that the axis runs along.

    Along a dimension that is the axis itself, `new[i] = old[indices[i]]`; the factors of a product
    and the blocks of a concatenation are taken each by itself. Fewer indices than units make
    smaller arrays, repeated ones copy units.

    Args:
      params: a tree of arrays.
      axes: its axes tree; names may be plain strings.
      indices: integer vectors by name of axis; axes that are not named stay as they are. They may
        be traced, and vmapped over.

    Returns:
      The tree with its dtypes and new shapes.

    Raises:
      ValueError: an unknown axis, an index out of range, or an axes tree that contradicts the
        shapes.
      TypeError: indices that are no integer vector.

    >>> params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3.0)}
    >>> axes = {"w": (None, "hidden"), "b": ("hidden",)}
    >>> take(params, axes, {"hidden": jnp.array([2, 0])})["w"]
    Array([[2., 0.],
           [5., 3.]], dtype=float32)
    """
    axes = resolve(params, axes)
    known = named(axes)
    for name, index in indices.items():
        if name not in known:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, known)}")
        if np.ndim(index) != 1 or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise TypeError(
                f"axis {name!r}: indices are {jnp.result_type(index)}{np.shape(index)}, "
                "and an integer vector was due"
            )
        size = known[name].size
        if tree.concrete(index):
            outside = (np.asarray(index) < 0) | (np.asarray(index) >= size)
            if outside.any():
                bad = np.asarray(index)[outside][0]
                raise ValueError(f"axis {name!r} of size {size} has no unit {bad}")
    out = []
    for _, leaf, entries in pairs(params, axes):
        for d, entry in enumerate(entries):
            if any(a.name in indices for a in members(entry)):
                where = positions(entry, indices)
                host = isinstance(leaf, np.ndarray) and isinstance(where, np.ndarray)
                leaf = (np if host else jnp).take(leaf, where, axis=d, mode="clip")
        out.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), out)


def permute(
    params: PyTree, axes: PyTree, permutations: Mapping[str, Int[Array | np.ndarray, " units"]]
) -> PyTree:
    """Permute the units of axes; the function of the params stays what it was.

    `new[i] = old[permutation[i]]` along every dimension that is the axis, as in `take`.

    Args:
      params: a tree of arrays.
      axes: its axes tree; names may be plain strings.
      permutations: a permutation of 0 ... size - 1 by name of axis. They may be traced, and are
        then not checked.

    Raises:
      ValueError: as for `take`, and for what is no permutation.
      TypeError: as for `take`.

    >>> params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3.0)}
    >>> axes = {"w": (None, "hidden"), "b": ("hidden",)}
    >>> permute(params, axes, {"hidden": jnp.array([2, 0, 1])})["b"]
    Array([2., 0., 1.], dtype=float32)
    """
    known = named(resolve(params, axes))
    for name, p in permutations.items():
        if name not in known:
            continue  # take says so
        size = known[name].size
        if np.shape(p) != (size,):
            raise ValueError(
                f"axis {name!r} has size {size}, and its permutation the shape {np.shape(p)}"
            )
        if tree.concrete(p) and (np.sort(np.asarray(p)) != np.arange(size)).any():
            raise ValueError(f"axis {name!r}: not a permutation of 0 ... {size - 1}: {p}")
    return take(params, axes, permutations)


def check(
    apply_fn: Callable[..., Any],
    params: PyTree,
    axes: PyTree,
    args: Sequence[Any] = (),
    *,
    key: PRNGKeyArray | None = None,
    tol: float = 1e-5,
) -> float:
    r"""Prove an axes tree on random permutations: `apply_fn(params, *args)` must not change.

    Every axis is permuted at random, all at once; where the outputs differ, one by one, to name
    the axes that break. The leaves are first jittered, :math:`\theta (1 + n / 10)` with normal n,
    and zeros drawn from [0, 1/10]: among equal biases or gains a permutation does not show.

    Args:
      apply_fn: a deterministic function of params and args.
      params: a tree of arrays.
      axes: the axes tree to prove, found or written by hand.
      args: the further arguments of apply_fn.
      key: of the permutations and of the jitter; `jax.random.key(0)` if None.
      tol: the largest deviation of an output relative to its largest entry. Sums in another order
        differ in the last bits: 1e-5 suits float32, and bfloat16 needs about 1e-2.

    Returns:
      The largest relative deviation.

    Raises:
      ValueError: the outputs differ, with the axes that break; an output is not finite; or the
        tree contradicts the shapes.

    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3), "v": jnp.ones((3, 1))}
    >>> mlp = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    >>> axes = {"w": (None, "mlp"), "b": (None,), "v": ("mlp", None)}
    >>> check(mlp, params, axes, (jnp.ones((1, 2)),))
    Traceback (most recent call last):
    ...
    ValueError: not an axis of this function: 'mlp' of size 3 (v:0, w:1) changes an output by ...
    """
    if key is None:
        key = jax.random.key(0)
    axes = resolve(params, axes)
    known = named(axes)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    params = jax.tree.map(lambda x: _jitter(rng, x), params)
    run = jax.jit(apply_fn)
    expected = jax.tree.leaves(run(params, *args))
    for i, x in enumerate(expected):
        if not np.isfinite(np.asarray(x, np.complex128)).all():
            raise ValueError(f"output {i} is not finite on jittered params: nothing can be proved")

    def deviation(chosen: Mapping[str, Any]) -> float:
        got = jax.tree.leaves(run(permute(params, axes, chosen), *args))
        return max((_distance(x, y) for x, y in zip(expected, got, strict=True)), default=0.0)

    permutations = {name: _shuffle(rng, a.size) for name, a in known.items()}
    worst = deviation(permutations) if permutations else 0.0
    if worst <= tol:
        return worst
    single = {name: deviation({name: p}) for name, p in permutations.items()}
    broken = {name: x for name, x in single.items() if not x <= tol}
    if not broken:
        raise ValueError(
            f"each axis alone keeps the outputs to {tol:g}, and all together change one by "
            f"{worst:.2g} of its scale: the tolerance is too tight, or axes cannot be permuted "
            "independently"
        )
    where = {
        name: [
            f"{path}:{d}"
            for path, _, entries in pairs(params, axes)
            for d, e in enumerate(entries)
            if name in (a.name for a in members(e))
        ]
        for name in broken
    }
    listed = "; ".join(
        f"{name!r} of size {known[name].size} ({', '.join(where[name])}) changes an output by "
        f"{x:.2g} of its scale"
        for name, x in broken.items()
    )
    raise ValueError(f"not an axis of this function: {listed}")


def _jitter(rng: np.random.Generator, leaf: Any) -> Any:
    if not tree.is_inexact(leaf):
        return leaf
    leaf = np.asarray(leaf)
    gain = 1 + 0.1 * rng.standard_normal(leaf.shape)
    return np.where(leaf == 0, 0.1 * rng.random(leaf.shape), leaf * gain).astype(leaf.dtype)


def _shuffle(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random permutation that is not the identity."""
    p = rng.permutation(n)
    return np.roll(p, 1) if (p == np.arange(n)).all() else p


def _distance(x: Any, y: Any) -> float:
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return 0.0 if (np.asarray(x) == np.asarray(y)).all() else np.inf
    wide = np.complex128 if jnp.iscomplexobj(x) else np.float64
    x, y = np.asarray(x, wide), np.asarray(y, wide)
    scale = np.abs(x).max(initial=0.0)
    error = np.abs(x - y).max(initial=0.0)
    return float(error / scale if scale else error)
