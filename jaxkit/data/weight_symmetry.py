"""Symmetries of networks: other weights of the same function, drawn at random.

Each is ``(key, params, axes, ...) -> params``, of one network; `jax.vmap` it over many. Any network
may permute its units, one with odd activations may flip their signs, and one with sines may shift
their phases. Axes trees and roles come from `jaxkit.trace.axes` and `jaxkit.trace.roles`, or are
written by hand.

Reference: as for `jaxkit.data.weight_mixup`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import trace, tree
from jaxkit.trace.names import Entry, lay_out, members, nearest, pairs

Number = float | Float[Array, ""]

__all__ = ["flipped_signs", "permuted_units", "shifted_phases"]


def permuted_units(key: PRNGKeyArray, params: PyTree, axes: PyTree) -> PyTree:
    """Permute the units of every axis at random; the function stays what it was.

    Args:
      key: a typed key.
      params: a network.
      axes: its axes tree.

    Raises:
      ValueError: an axes tree that contradicts the shapes.
      TypeError: a legacy uint32 key.

    Reference: as for `jaxkit.data.weight_mixup`.

    >>> params, axes = {"w": jnp.array([[1.0, 2.0, 3.0]])}, {"w": (None, "hidden")}
    >>> sorted(permuted_units(jax.random.key(0), params, axes)["w"][0].tolist())
    [1.0, 2.0, 3.0]
    """
    sizes = {name: axis.size for name, axis in trace.named(trace.resolve(params, axes)).items()}
    keys = tree.keys(key, sizes, "permuted units")
    perms = {name: jax.random.permutation(keys[name], n) for name, n in sizes.items()}
    return trace.permute(params, axes, perms)


def flipped_signs(
    key: PRNGKeyArray,
    params: PyTree,
    axes: PyTree,
    roles: PyTree,
    *,
    activation: Callable[[Array], Array],
    rate: Number = 0.5,
    names: Sequence[str] | None = None,
) -> PyTree:
    """Flip the sign of units: of all that produces them (W, b), and of all that consumes them.

    With s_j = -1 with probability `rate`, else 1: W[:, j] s_j, b[j] s_j and W'[j, :] s_j. The
    function stays what it was if there is nothing but odd functions of single units, and sums of
    them, between the leaves that produce them and those that consume them (no norm, and no gate,
    which multiplies two). The output has no axis, so the last layer keeps its signs.

    Args:
      key: a typed key.
      params: a network.
      axes: its axes tree.
      roles: its roles, of `jaxkit.trace.roles`.
      activation: the function of single units in the network, such as `jnp.sin` or `jnp.tanh`: that
        it is odd is tested at a few numbers.
      rate: the probability to flip a unit, maybe traced.
      names: the axes whose units may be flipped; default: all.

    Raises:
      ValueError: an activation that is not odd (as relu); an axis of a leaf that is no kernel, bias
        or embedding (a norm has other symmetries), naming the leaf; an unknown axis.
      TypeError: a legacy uint32 key.

    Reference: as for `jaxkit.data.weight_mixup`.

    >>> params = {"w": jnp.ones((1, 3)), "v": jnp.ones((3, 1))}
    >>> f = lambda p, x: jnp.sin(x @ p["w"]) @ p["v"]
    >>> x = jnp.ones((1, 1))
    >>> axes, roles = trace.axes(f, params, x), trace.roles(f, params, x)
    >>> flipped = flipped_signs(jax.random.key(0), params, axes, roles, activation=jnp.sin)
    >>> bool((flipped["w"].ravel() == flipped["v"].ravel()).all()), float(f(flipped, x)[0, 0])
    (True, 2.5244...)
    >>> flipped_signs(jax.random.key(0), params, axes, roles, activation=jax.nn.relu)
    Traceback (most recent call last):
    ...
    ValueError: the activation is not odd: f(-x) = -f(x) was due, so that signs may be flipped
    """
    if not _opposite(activation, lambda x: -x):
        raise ValueError(
            "the activation is not odd: f(-x) = -f(x) was due, so that signs may be flipped"
        )
    axes = trace.resolve(params, axes)
    signs = {
        name: jnp.where(jax.random.bernoulli(key, rate, (size,)), -1.0, 1.0)
        for name, (key, size) in _units(key, axes, names, "flipped signs").items()
    }
    return _multiply(params, axes, roles, signs, ("produced", "consumed"))


def shifted_phases(
    key: PRNGKeyArray,
    params: PyTree,
    axes: PyTree,
    roles: PyTree,
    *,
    activation: Callable[[Array], Array],
    w0: Number = 30.0,
    turns: int = 4,
    names: Sequence[str] | None = None,
) -> PyTree:
    r"""Shift the phase of units: b[j] + k_j pi / w0, and W'[j, :] (-1)^k_j in what consumes them.

    k_j is drawn from -turns ... turns - 1. The function stays what it was if a unit is
    sin(w0 (W x + b)), and nothing else stands between its bias and what consumes it. (With
    sin(w0 W x + b) the period of b is another: w0=1.)

    Args:
      key: a typed key.
      params: a network.
      axes: its axes tree.
      roles: its roles, of `jaxkit.trace.roles`.
      activation: the function of W x + b, such as ``lambda x: jnp.sin(30 * x)``: that
        f(x + pi / w0) = -f(x) is tested at a few numbers (if w0 is known).
      w0: the frequency, maybe traced.
      turns: the most half turns.
      names: the axes whose units may be shifted; default: all.

    Raises:
      ValueError: an activation of another period; an axis that has not one bias and one kernel that
        produce it (of a residual stream, say), naming the leaves; and what `flipped_signs` raises.
      TypeError: a legacy uint32 key.

    Reference: as for `jaxkit.data.weight_mixup`.

    >>> params = {"w": jnp.ones((1, 3)), "b": jnp.zeros(3), "v": jnp.ones((3, 1))}
    >>> f = lambda p, x: jnp.sin(30 * (x @ p["w"] + p["b"])) @ p["v"]
    >>> x = jnp.ones((1, 1))
    >>> axes, roles = trace.axes(f, params, x), trace.roles(f, params, x)
    >>> act = lambda x: jnp.sin(30 * x)
    >>> shifted = shifted_phases(jax.random.key(0), params, axes, roles, activation=act)
    >>> jnp.allclose(f(shifted, x), f(params, x), atol=1e-4).item()
    True
    """
    if tree.concrete(w0) and not _opposite(activation, lambda x: x + np.pi / w0):
        raise ValueError(
            f"the activation has another period: f(x + pi / w0) = -f(x) was due, with w0={w0}"
        )
    axes = trace.resolve(params, axes)
    units = _units(key, axes, names, "shifted phases")
    for name in units:
        makers = {
            path: role.kind
            for path, _, entries, role in _leaves(params, axes, roles)
            for entry, does in zip(entries, role.dims, strict=True)
            if does == "produced" and _touches(entry, {name: 0})
        }
        if sorted(makers.values()) != ["bias", "kernel"]:
            raise ValueError(
                f"axis {name!r}: one kernel and one bias were due to produce its units, "
                f"and {makers or 'no leaf'} came"
            )
    turn = {
        name: jax.random.randint(key, (size,), -turns, turns) for name, (key, size) in units.items()
    }
    signs = {name: jnp.where(k % 2 == 1, -1.0, 1.0) for name, k in turn.items()}
    params = _multiply(params, axes, roles, signs, ("consumed",))
    shifts = {name: k * (jnp.pi / w0) for name, k in turn.items()}
    out = []
    for _, leaf, entries, role in _leaves(params, axes, roles):
        if role.kind == "bias":
            for d, entry in enumerate(entries):
                if _touches(entry, shifts):
                    leaf = leaf + _along(entry, shifts, jnp.add, 0.0, leaf, d).astype(leaf.dtype)
        out.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), out)


def _opposite(activation: Callable[[Array], Array], move: Callable[[Array], Array]) -> bool:
    """Tell whether the activation at the moved numbers is minus that at the numbers."""
    with jax.ensure_compile_time_eval():
        x = jnp.linspace(-2.0, 2.5, 19)
        return bool(jnp.allclose(activation(move(x)), -activation(x), atol=1e-3))


def _units(
    key: PRNGKeyArray, axes: PyTree, names: Sequence[str] | None, tag: str
) -> dict[str, tuple[PRNGKeyArray, int]]:
    """Return the key and the size of each chosen axis."""
    known = trace.named(axes)
    for name in names or ():
        if name not in known:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, known)}")
    keys = tree.keys(key, dict.fromkeys(known, 0), tag)
    return {name: (keys[name], known[name].size) for name in (known if names is None else names)}


def _leaves(params: PyTree, axes: PyTree, roles: PyTree) -> Iterator[tuple[str, Any, tuple, Any]]:
    kinds = jax.tree.structure(params).flatten_up_to(roles)
    for (path, leaf, entries), role in zip(pairs(params, axes), kinds, strict=True):
        yield path, leaf, entries, role


def _touches(entry: Entry, factors: Mapping[str, Any]) -> bool:
    return any(axis.name in factors for axis in members(entry))


def _along(
    entry: Entry, factors: Mapping[str, Array], join: Any, neutral: float, leaf: Any, d: int
) -> Array:
    """Lay factors of units along dimension d of a leaf."""
    laid = jnp.asarray(lay_out(entry, factors, join, np.float32(neutral)))
    return laid.reshape([-1 if i == d else 1 for i in range(np.ndim(leaf))])


def _multiply(
    params: PyTree,
    axes: PyTree,
    roles: PyTree,
    signs: Mapping[str, Array],
    what: tuple[str, ...],
) -> PyTree:
    """Multiply the dimensions that produce units, consume them, or both."""
    out = []
    for path, leaf, entries, role in _leaves(params, axes, roles):
        for d, entry in enumerate(entries):
            if not _touches(entry, signs):
                continue
            does = role.dims[d]
            if role.kind not in ("kernel", "bias", "embedding") or does is None:
                raise ValueError(
                    f"{path!r}, dimension {d}, runs along {[a.name for a in members(entry)]} and "
                    f"is {does or 'neither produced nor consumed'} in a leaf of kind "
                    f"{role.kind!r}, and only kernels, biases and embeddings may produce or "
                    "consume units of flipped signs: choose other axes by `names`"
                )
            if does in what:
                leaf = leaf * _along(entry, signs, jnp.multiply, 1.0, leaf, d).astype(leaf.dtype)
        out.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(params), out)
