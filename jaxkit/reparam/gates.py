"""Gates: numbers in [0, 1] that are learned, sharpened while they train, and become a mask.

`gate` turns scores into gates. What they multiply: the units of named axes (`gate_units`, for which
a unit mask and `masks.shrink` wait at the end), or the rows of a table (`optfs`).
"""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.reparam.core import Reparam, install, leafwise, matched
from jaxkit.reparam.supermask import straight_through
from jaxkit.trace.names import (
    Entry,
    lay_out,
    members,
    named,
    nearest,
    pairs,
    resolve,
)

__all__ = [
    "budget_pressure",
    "expected_entries",
    "gate",
    "gate_penalty",
    "gate_units",
    "keep_rows",
    "optfs",
    "temperature",
]

MODES = ("sigmoid", "hard", "bernoulli", "gumbel")


def gate(
    scores: PyTree,
    beta: float | Array | PyTree = 1.0,
    *,
    mode: str = "sigmoid",
    key: PRNGKeyArray | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Return the gates of scores, with p = sigmoid(beta s), beta s clipped to ±30.

    =========  =====================================  ===========================
    mode       value                                  gradient
    =========  =====================================  ===========================
    sigmoid    p                                      beta p (1 - p)
    hard       [s > 0]                                none
    bernoulli  q p, q = 1 with probability p, else 0  q beta p (1 - p)
    gumbel     [beta s + noise > 0]                   that of sigmoid(beta s + noise)
    =========  =====================================  ===========================

    The noise of `gumbel` is logistic, the difference of two Gumbel draws, so that a gate is 1 with
    probability p. A `bernoulli` gate has mean p^2, not p. As beta grows all become [s > 0].

    Args:
      scores: a tree of floats; the gates are float32 or wider.
      beta: the inverse temperature: a number, or a tree like scores of numbers or arrays.
      mode: see the table.
      key: a typed key for the modes that draw; each leaf draws for itself.

    Raises:
      ValueError: an unknown mode, or no key for one that draws.
      TypeError: a legacy uint32 key.

    References: C. Louizos, M. Welling, D. Kingma, "Learning Sparse Neural Networks through L0
    Regularization", arXiv:1712.01312; P. Savarese, H. Silva, M. Maire, "Winning the Lottery with
    Continuous Sparsification", arXiv:1912.04427; for `bernoulli`, X. Yuan, P. Savarese, M. Maire,
    "Growing Efficient Deep Networks by Structured Continuous Sparsification", arXiv:2007.15353.

    >>> gate({"mlp": jnp.array([0.0, 50.0])}, 2.0)["mlp"].tolist()
    [0.5, 1.0]
    >>> gate({"mlp": jnp.array([0.0, 1.0, -1.0])}, mode="hard")["mlp"].tolist()
    [0.0, 1.0, 0.0]
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}, and one of {MODES} was due")
    if mode in ("bernoulli", "gumbel") and key is None:
        raise ValueError(f"mode={mode!r} draws, and needs a key")
    if jax.tree.structure(beta) != jax.tree.structure(scores):
        beta = jax.tree.map(lambda s: beta, scores)

    def one(s: Array, b: Any, k: Any) -> Array:
        s = tree.float32(s)
        if mode == "hard":
            return (s > 0).astype(s.dtype)
        logit = jnp.clip(b * s, -30, 30)
        p = jax.nn.sigmoid(logit)
        if mode == "bernoulli":
            return jnp.where(jax.random.uniform(k, s.shape, s.dtype) < p, p, 0)
        if mode == "gumbel":
            noisy = logit + jax.random.logistic(k, s.shape, s.dtype)
            return straight_through(jax.nn.sigmoid(noisy), noisy > 0)
        return p

    every = scores if key is None else tree.keys(key, scores, "jaxkit.reparam.gate")
    return jax.tree.map(one, scores, beta, every)


def gate_penalty(scores: PyTree, beta: float | Array | PyTree = 1.0) -> Float[Array, ""]:
    """Return sum sigmoid(beta s), the expected number of open gates.

    >>> gate_penalty({"mlp": jnp.zeros(8)}).item()
    4.0
    """
    return sum((g.sum() for g in jax.tree.leaves(gate(scores, beta))), jnp.zeros(()))


def temperature(
    epoch: Float[Array, "..."] | float, epochs: int, *, final: float | Array = 200.0
) -> Float[Array, "..."]:
    """Return beta = final^(epoch / (epochs - 1)): 1 at epoch 0, `final` at the last.

    Args:
      epoch: 0 ... epochs - 1; or, for gates that sharpen one by one, for how many epochs each was
        open (then ``epochs`` is one more than the run has).
      epochs: 2 or more.
      final: more than 1.

    Raises:
      ValueError: fewer than two epochs, or a final temperature that does not sharpen
        (if it is known).

    >>> temperature(1, 3, final=100.0).round(3).item()
    10.0
    """
    if epochs < 2:
        raise ValueError(f"epochs={epochs}, and 2 or more were due to go from 1 to {final}")
    if violates(lambda final: final > 1, final):
        raise ValueError(f"final={final}, and more than 1 was due: gates would not harden")
    return jnp.float32(final) ** (jnp.asarray(epoch, jnp.float32) / (epochs - 1))


# ------------------------------------------------------------------------------ gates of units


def _spread(entry: Entry, gates: Mapping[str, Array]) -> Array:
    """Return the gate of every position of a dimension."""
    return jnp.asarray(lay_out(entry, gates, operator.mul, np.float32(1)))


def _check(gates: Mapping[str, Array], axes: PyTree) -> None:
    known = named(axes)
    for name, g in gates.items():
        if name not in known:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, known)}")
        if jnp.shape(g) != (known[name].size,):
            raise ValueError(
                f"axis {name!r} has size {known[name].size}, and its gates {jnp.shape(g)}"
            )


def gate_units(
    params: PyTree, gates: Mapping[str, Float[Array, " units"]], axes: PyTree, roles: PyTree
) -> PyTree:
    """Multiply the units of axes by gates where they are read: w * g along consumed dimensions.

    A unit with gate g then reaches the leaves that read it as g times itself, whatever the
    activation, and with a BatchNorm on the way, which would undo a factor on the weights that
    produce the unit. Where g = 0 the entries of the unit are zero in all its leaves, as those of
    `masks.units`, and get no gradient. So gates of 0 and 1 compute what the model without the
    closed units computes, the one of `masks.shrink`.

    To grow or shrink by structured continuous sparsification, ``scores = {axis: (units,)}`` are
    trained with the weights. At the start of each epoch, draw which units are open and sharpen
    those; a small initial score is rarely drawn, and a seed of a few units starts above 0::

        beta = {a: temperature(t, epochs + 1) for a, t in age.items()}
        opened = {a: g > 0 for a, g in gate(scores, beta, mode="bernoulli", key=key).items()}
        age = {a: t + opened[a] for a, t in age.items()}

    and in the loss::

        soft = gate(scores, beta)
        gates = {a: jnp.where(opened[a], g, 0) for a, g in soft.items()}
        cost = expected_entries(params, gate(scores, mode="hard"), axes)
        lam = budget_pressure(cost, target, full=full)
        loss_fn(gate_units(params, gates, axes, roles), batch) + lam * gate_penalty(scores, beta)

    At the end ``masks.shrink(params, {a: s > 0 for a, s in scores.items()}, axes)``. (The cost is
    that of the hard gates: of the soft ones, units that are never drawn would take a share. Under
    jit the shapes are fixed and closed units cost what open ones do: to save in training, `shrink`
    by `opened` each epoch, and compile anew.) A whole residual branch, x + m f(x), has the gate of
    the leaves that end it: ``leafwise(lambda key, path, w: start, lambda s, w: w * gate(s, beta),
    where=...)``.

    Args:
      params: a tree of arrays.
      gates: by name of axis.
      axes: from `trace.axes`; names may be plain strings.
      roles: from `trace.roles`.

    Raises:
      ValueError: an unknown axis, gates of another size, or an axis that no leaf reads.

    Reference: X. Yuan, P. Savarese, M. Maire, "Growing Efficient Deep Networks by Structured
    Continuous Sparsification", arXiv:2007.15353. (The paper multiplies the filters that produce the
    unit; without a norm behind them and with relu that is the same function.)

    >>> from jaxkit import trace
    >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 1))}
    >>> apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> axes = {"up": (None, "mlp"), "down": ("mlp", None)}
    >>> roles = trace.roles(apply_fn, params, jnp.ones((4, 2)))
    >>> gate_units(params, {"mlp": jnp.array([1.0, 0.5, 0.0])}, axes, roles)["down"].tolist()
    [[1.0], [0.5], [0.0]]
    """
    axes = resolve(params, axes)
    _check(gates, axes)
    found = jax.tree.leaves(roles, is_leaf=lambda r: hasattr(r, "dims"))
    out, read = [], set()
    for (_, leaf, entries), role in zip(pairs(params, axes), found, strict=True):
        for d, entry in enumerate(entries):
            mine = {a.name for a in members(entry)} & set(gates)
            if not mine:
                continue
            factors = _spread(entry, gates)
            if role.dims[d] == "consumed":
                read |= mine
            else:
                factors = factors != 0
            shape = [-1 if i == d else 1 for i in range(np.ndim(leaf))]
            leaf = leaf * factors.reshape(shape).astype(leaf.dtype)
        out.append(leaf)
    if unread := set(gates) - read:
        raise ValueError(
            f"no leaf reads the axis {min(unread)!r} (contracts over it), so that its gates would "
            "do nothing"
        )
    return jax.tree.unflatten(jax.tree.structure(params), out)


def expected_entries(
    params: PyTree, gates: Mapping[str, Float[Array, " units"]], axes: PyTree
) -> Float[Array, ""]:
    """Return how many entries the leaves have if each unit is there with its gate's probability.

    sum over leaves of the product over dimensions of the sum of gates along it: exactly the number
    of entries after `masks.shrink` for gates of 0 and 1, the expectation for independent units that
    run along one dimension of a leaf.

    Args:
      params: a tree of arrays, or of their shapes.
      gates: by name of axis.
      axes: from `trace.axes`; names may be plain strings.

    Raises:
      ValueError: an unknown axis, or gates of another size.

    >>> axes = {"up": (None, "mlp"), "down": ("mlp", None)}
    >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 1))}
    >>> expected_entries(params, {"mlp": jnp.array([1.0, 0.5, 0.0])}, axes).item()
    4.5
    """
    axes = resolve(params, axes)
    _check(gates, axes)
    total = jnp.zeros(())
    for _, leaf, entries in pairs(params, axes):
        entries_of_leaf = jnp.ones(())
        for n, entry in zip(np.shape(leaf), entries, strict=True):
            gated = any(a.name in gates for a in members(entry))
            entries_of_leaf = entries_of_leaf * (_spread(entry, gates).sum() if gated else n)
        total = total + entries_of_leaf
    return total


def budget_pressure(
    cost: Float[Array, ""],
    target: float | Array,
    *,
    full: float | Array,
    base: float | Array = 1.0,
) -> Float[Array, ""]:
    """Return the coefficient of the penalty: base (1 - target / cost), without gradient.

    Negative below the budget, where it opens gates, positive above, where it closes them.

    Args:
      cost: what the model costs now (`expected_entries`).
      target: the budget, in the same units.
      full: the cost with all units.
      base: the largest coefficient.

    Raises:
      ValueError: a budget that is not between 0 and `full` (if they are known).

    Reference: as for `gate_units`.

    >>> budget_pressure(jnp.array(50.0), 100.0, full=400.0).item()
    -1.0
    """
    if violates(lambda target, full: (target > 0) & (target < full), target, full):
        raise ValueError(f"the budget is {target}, and one between 0 and {full} was due")
    return base * (1 - target / jax.lax.stop_gradient(cost))


# ------------------------------------------------------------------------------ gates of rows


def optfs(tau: float | Array, *, where: tree.Where, start: float = 0.5, axis: int = 0) -> Reparam:
    """Gate the rows of a table: e_i becomes e_i sigmoid(tau c_i) / sigmoid(start).

    A row is one value of a categorical feature. theta is ``{path: c}`` with one number a row,
    `start` at first, so that at tau = 1 the model is what it was. Search: train c with the weights
    (no weight decay on c), with a small multiple of ``gate_penalty(theta, tau)``, and
    ``tau = temperature(epoch, epochs)``. Then take the rows with c > 0 that were ever seen (of the
    others c says nothing: the penalty alone moves it, and under Adam by up to the learning rate a
    step, however small its factor), go back to the weights of an early epoch, and train them under
    `keep_rows` alone::

        kept = {path: (c > 0) & seen for path, c in theta.items()}
        loss_fn(keep_rows(params, kept), batch)

    Args:
      tau: the inverse temperature.
      where: the tables.
      start: the first score.
      axis: the axis of the rows.

    Raises:
      ValueError: a `where` that matches nothing.

    Reference: F. Lyu, X. Tang, D. Liu, L. Chen, X. He, X. Liu, "Optimizing Feature Set for
    Click-Through Rate Prediction", arXiv:2301.10909.

    >>> r = optfs(1.0, where="**/embedding")
    >>> params = {"embedding": jnp.arange(4.0).reshape(2, 2)}
    >>> theta = r.init(jax.random.key(0), params)
    >>> theta["embedding"].tolist(), r.apply(theta, params)["embedding"].tolist()
    ([0.5, 0.5], [[0.0, 1.0], [2.0, 3.0]])
    """

    def init(key: PRNGKeyArray, path: str, w: Array) -> Array:
        return jnp.full(w.shape[axis], start, tree.float32(w).dtype)

    def apply(c: Array, w: Array) -> Array:
        return _rows(w, gate(c, tau) / gate(jnp.full_like(c, start)), axis)

    return leafwise(init, apply, where=where)


def keep_rows(
    params: PyTree,
    kept: Mapping[str, Bool[Array, " rows"]],
    *,
    start: float = 0.5,
    axis: int = 0,
) -> PyTree:
    """Return params with rows of tables times 1 / sigmoid(start) where they are kept, 0 elsewhere.

    What `optfs` becomes as tau grows: the factor stays.

    Args:
      params: a tree of arrays.
      kept: which rows, by path of the table.
      start, axis: as they were for `optfs`.

    Raises:
      ValueError: a path that params does not have, or another number of rows.

    Reference: as for `optfs`.

    >>> params = {"embedding": jnp.ones((2, 1))}
    >>> keep_rows(params, {"embedding": jnp.array([True, False])}, start=0.0)["embedding"].tolist()
    [[2.0], [0.0]]
    """
    factor = 1 / gate(jnp.float32(start))
    rows = lambda path, w: _rows(w, jnp.where(kept[path], factor, 0), axis)
    return install(params, {path: rows(path, w) for path, w in matched(params, kept).items()})


def _rows(w: Array, factors: Array, axis: int) -> Array:
    shape = [-1 if i == axis % w.ndim else 1 for i in range(w.ndim)]
    return tree.float32(w) * factors.reshape(shape)
