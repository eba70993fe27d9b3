"""Sparse training: an optax transformation that keeps pruned entries at exactly zero.

`sparse` is the primitive: it wraps any optax transformation, carries the mask in its state, and
may let a rule change the mask every few steps; `constrain` is the same with entries outside the
mask frozen as they are. The methods are rules: `gradual` prunes, `rigl` drops and grows. No hook
in the train step: gradients of the loss at the (masked) params go in, dense, and
``optax.apply_updates`` leaves exact zeros.

The wrapped transformation sees the sparse problem: gradients and params are masked on the way in,
so that global-norm clipping, trust ratios and preconditioners measure what is there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit.masks.score import magnitude, random
from jaxkit.masks.select import Mask, check_sparsity, keep_where, topk

Rule = Callable[[PRNGKeyArray | None, Mask, PyTree, PyTree, Int[Array, ""]], Mask]

__all__ = [
    "ConstrainState",
    "Rule",
    "SparseState",
    "constrain",
    "current",
    "gradual",
    "hold",
    "regrow",
    "rigl",
    "sparse",
    "update_mask",
]


class SparseState(NamedTuple):
    """The state of `sparse`: updates seen, the mask in force, the wrapped state, the key."""

    step: Int[Array, ""]
    mask: Mask
    inner: Any
    key: PRNGKeyArray | None


class ConstrainState(NamedTuple):
    """The state of `constrain`, field by field that of `sparse`."""

    step: Int[Array, ""]
    mask: Mask
    inner: Any
    key: PRNGKeyArray | None


def _fit(mask: Mask, params: PyTree) -> Mask:
    """Copy the mask (donating the state must not take the caller's array), checked."""
    if not jax.tree.leaves(params):  # an empty tree, or the placeholder of optax.tree.map_params
        return params
    tree.check_like(params, mask, "mask")
    return jax.tree.map(lambda m: jnp.array(m, bool) if tree.is_array(m) else m, mask)


def sparse(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[[PyTree], Mask],
    *,
    update: Rule | None = None,
    every: int | Array = 1,
    begin: int | Array = 0,
    end: int | Array | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that entries outside the mask are zero after every update.

    With m the mask: the wrapped transformation gets m*g and m*w; of its update u the entries in m
    go out, and -w at all others. So w + update is exactly 0 outside the mask for finite w, in every
    dtype, whatever momentum, weight decay or noise the transformation has, and also if the first
    params were not masked yet.

    Args:
      tx: any optax transformation; clipping, schedules and accumulation may be inside it, and
        `sparse` itself inside ``optax.chain`` (last) or ``optax.MultiSteps``.
      mask: a tree of bools like params, or a function of the first params that returns it. It is
        copied into the state, so that a checkpoint of the state is complete and donation safe.
      update: a rule ``(key, mask, params, grads, step) -> mask`` that is called, under ``cond``, at
        the steps begin, begin + every, ... and end, with the dense gradient, before the update. The
        state of `tx` is initialized anew at the entries that change sides.
      every, begin, end: when; traced numbers are fine.
      key: a typed key for rules that draw; each call of the rule gets ``fold_in(key, step)``.

    Returns:
      A transformation whose ``update(grads, state, params)`` needs params. Read the mask with
      ``current(opt_state)``.

    Raises:
      ValueError: a mask that does not fit params, or update without params.
      TypeError: a legacy uint32 key.

    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> tx = sparse(optax.adamw(0.1), {"kernel": jnp.array([[True, False]])})
    >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()[0][1]
    0.0
    """
    return _masked(SparseState, lambda w: -w, tx, mask, update, every, begin, end, key)


def constrain(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[[PyTree], Mask],
    *,
    update: Rule | None = None,
    every: int | Array = 1,
    begin: int | Array = 0,
    end: int | Array | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that entries outside the mask stay as they are, to the bit.

    With m the mask: the wrapped transformation gets m*g and m*w, as if the entries in m were all
    there is; of its update u the entries in m go out, and -0 at all others (w + -0 is w, for w = -0
    too). So nothing moves a frozen entry: no momentum, no decoupled weight decay, no noise. The
    model still reads it, for params are not masked. (``optax.masked`` and ``freeze`` act on whole
    leaves, and `sparse` puts zeros where this one freezes.)

    Both may be nested: ``sparse(constrain(tx, ~used), mask)`` trains what is in the mask and not in
    use, holds what is in both, and zeroes the rest.

    Args:
      tx: any optax transformation, see `sparse`.
      mask: a tree of bools like params, True where training goes on, or a function of the first
        params that returns it.
      update: a rule that changes the mask, see `sparse`. Entries that change sides keep their
        value; the state of `tx` is initialized anew there.
      every, begin, end, key: as in `sparse`.

    Returns:
      A transformation whose ``update(grads, state, params)`` needs params. What follows it in a
      chain must leave zeros alone.

    Raises:
      ValueError: a mask that does not fit params, or update without params.
      TypeError: a legacy uint32 key.

    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> tx = constrain(optax.adamw(0.1), {"kernel": jnp.array([[True, False]])})
    >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()[0][1]
    1.0
    """
    frozen = lambda w: jnp.full_like(w, -0.0)
    return _masked(ConstrainState, frozen, tx, mask, update, every, begin, end, key)


def _masked(kind, outside, tx, mask, update, every, begin, end, key):
    """Wrap `tx`: what goes in is masked, and outside the mask goes out ``outside(w)``."""
    inner_tx = optax.with_extra_args_support(tx)
    if key is not None:
        tree.check_key(key)

    def init(params):
        first = mask(params) if callable(mask) and jax.tree.leaves(params) else mask
        return kind(jnp.zeros((), jnp.int32), _fit(first, params), tx.init(params), key)

    def change(state, params, grads):
        folded = None if state.key is None else jax.random.fold_in(state.key, state.step)
        new = update(folded, state.mask, params, grads, state.step)
        return new, _renew(tx, state.inner, state.mask, new, keep_where(new, params))

    def step(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("a mask needs the params: tx.update(grads, state, params)")
        now, inner = state.mask, state.inner
        if update is not None:
            due = (state.step >= begin) & ((state.step - begin) % every == 0)
            if end is not None:
                due = (due & (state.step < end)) | (state.step == end)
            same = lambda state, params, grads: (state.mask, state.inner)
            now, inner = jax.lax.cond(due, change, same, state, params, updates)
        updates, inner = inner_tx.update(
            keep_where(now, updates), inner, keep_where(now, params), **extra
        )
        # in the wider of the two dtypes, or w - w would not be 0
        split = lambda u, w, m: jnp.where(m, u, outside(w)) if tree.is_inexact(w) else u
        updates = jax.tree.map(split, updates, params, now)
        count = jnp.asarray(optax.safe_increment(state.step))
        return updates, kind(count, now, inner, state.key)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, step))


def _renew(tx, state, old: Mask, new: Mask, params: PyTree) -> optax.OptState:
    """Initialize the state of `tx` anew at the entries whose side of the mask changed."""
    changed = jax.tree.map(lambda a, b: a != b, old, new)
    # (bools are the masks of wrappers inside, which have rules of their own)
    own = lambda s: tree.is_array(s) and s.dtype != bool
    here = lambda s, c: c if own(s) and jnp.shape(s) == jnp.shape(c) else False
    marks = optax.tree_utils.tree_map_params(
        tx,
        lambda s, c: s if isinstance(s, optax.MaskedNode) else here(s, c),
        state,
        changed,
        transform_non_params=lambda _: False,
        is_leaf=lambda s: isinstance(s, optax.MaskedNode),
    )
    fresh = lambda s, f, c: s if c is False else jnp.where(c, f, s)
    return jax.tree.map(fresh, state, tx.init(params), marks)


def hold(mask: Mask | Callable[[PyTree], Mask]) -> optax.GradientTransformationExtraArgs:
    """Keep pruned entries at zero, as the last link of a chain: u -> where(mask, u, -w).

    The cheap form of `sparse` for a static mask and an element-wise optimizer, which is the same
    with or without the pruned entries' gradients. What comes before it sees dense gradients (a
    global norm counts pruned entries), and what follows it, or averages around it, breaks the
    zeros; use `sparse` there.

    Raises:
      ValueError: a mask that does not fit params, or update without params.

    >>> tx = optax.chain(optax.adamw(1e-3), hold({"kernel": jnp.array([[True, False]])}))
    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> updates["kernel"].tolist()[0][1]
    -1.0
    """
    return sparse(optax.identity(), mask)


def current(opt_state: optax.OptState, kind: type | None = None) -> Mask:
    """Return a copy of the mask in force, found anywhere in an optimizer state.

    Args:
      opt_state: the state of an optimizer that has `sparse`, `constrain` or `hold` somewhere in it.
      kind: `SparseState` or `ConstrainState`, where both are nested in each other and one is meant.
        Default: the mask of `sparse`, and if there is none that of `constrain`.

    Raises:
      ValueError: the state holds no mask, or several of the kind.

    >>> tx = optax.chain(optax.adam(1e-3), hold({"kernel": jnp.array([[True, False]])}))
    >>> current(tx.init({"kernel": jnp.ones((1, 2))}))["kernel"].tolist()
    [[True, False]]
    """
    found = []
    for each in (SparseState, ConstrainState) if kind is None else (kind,):
        is_state = lambda s, each=each: isinstance(s, each)
        found = found or [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(f"the optimizer state holds {len(found)} masks, and one is due")
    return jax.tree.map(lambda m: jnp.array(m) if tree.is_array(m) else m, found[0].mask)


# ---------------------------------------------------------------- masks that change in training


def regrow(
    mask: Mask,
    scores: PyTree,
    growth: PyTree,
    *,
    drop_rate: float | Array,
    where: tree.Where = None,
) -> Mask:
    """Drop the live entries with the lowest scores and grow as many, leaf by leaf.

    In a leaf with n live entries, r = round(drop_rate n) with the smallest scores leave; then the r
    with the largest growth among all that are out, the ones just dropped included, come in. So n
    stays what it was.

    Args:
      mask: a tree of bools like params.
      scores: what live entries are worth (`magnitude` of the params, say).
      growth: what dead entries promise (`magnitude` of the dense gradient, or `random`).
      drop_rate: the share of the live entries that may move, in [0, 1].
      where: the leaves that change; default: the weights.

    >>> mask = {"w": jnp.array([[True, True, False, False]])}
    >>> scores, growth = {"w": jnp.array([[3.0, 1.0, 0, 0]])}, {"w": jnp.array([[0.0, 1, 2, 5]])}
    >>> regrow(mask, scores, growth, drop_rate=0.5)["w"].tolist()
    [[True, False, False, True]]
    """
    if isinstance(drop_rate, int | float) and not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate is {drop_rate}, and a share in [0, 1] is due")
    live = jax.tree.map(rank.count, mask)
    moved = jax.tree.map(lambda n: rank.share(n, drop_rate), live, is_leaf=rank.is_pair)
    stay = jax.tree.map(rank.minus, live, moved, is_leaf=rank.is_pair)
    kept = tree.topk(scores, stay, where=where, within=mask)
    grown = tree.topk(growth, moved, where=where, within=jax.tree.map(jnp.logical_not, kept))
    chosen = tree.select(scores, where)
    return jax.tree.map(lambda c, m, k, g: k | g if c else m, chosen, mask, kept, grown)


def update_mask(
    key: PRNGKeyArray | None,
    mask: Mask,
    params: PyTree,
    grads: PyTree | None,
    *,
    sparsity: float | Array | PyTree | None = None,
    drop_rate: float | Array = 0.0,
    where: tree.Where = None,
) -> Mask:
    """Prune to a sparsity, then move a share of the survivors: one step of dynamic sparse training.

    First, with `sparsity`, the live entries with the largest |w| stay (`topk` within the mask), so
    masks nest. Then, with `drop_rate`, every leaf drops that share of its live entries, smallest
    |w| first, and grows as many (`regrow`): where |dL/dw| is largest if there are gradients, else
    at random. The first alone is gradual magnitude pruning, the second alone RigL or SET, both
    GraNet.

    Args:
      key: a typed key for random growth, else None.
      mask: the mask in force.
      params: the params in force.
      grads: the dense gradient at the masked params (never through ``params * mask``, which is zero
        at every dead entry), or None to grow at random.
      sparsity: as in `topk`.
      drop_rate: the share of live entries that move, in [0, 1].
      where: the leaves that change; default: the weights.

    Raises:
      ValueError: growth with neither gradients nor a key, and what `topk` raises.

    >>> mask, params = {"w": jnp.array([[True, True, False]])}, {"w": jnp.array([[3.0, 1.0, 0.0]])}
    >>> grads = {"w": jnp.array([[0.0, 0.0, 1.0]])}
    >>> update_mask(None, mask, params, grads, drop_rate=0.5)["w"].tolist()
    [[True, False, True]]
    """
    tree.check_like(params, mask, "mask")
    if sparsity is not None:
        mask = topk(magnitude(params), sparsity=sparsity, where=where, within=mask)
    if isinstance(drop_rate, int | float) and drop_rate == 0:
        return mask
    if grads is None and key is None:
        raise ValueError("growth needs the dense gradients (grads), or a key to grow at random")
    growth = magnitude(grads) if key is None or grads is not None else random(key, params)
    return regrow(mask, magnitude(params), growth, drop_rate=drop_rate, where=where)


def gradual(
    tx: optax.GradientTransformation,
    sparsity: float | Array | PyTree,
    *,
    end: int,
    begin: int = 0,
    every: int | Array = 100,
    initial_sparsity: float | Array = 0.0,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning: train dense, prune along a cubic, end sparse.

    s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3 at t = begin, begin + every, ... and
    end; the live entries with the largest |w| stay, and what is pruned never returns.

    Args:
      tx: any optax transformation, see `sparse`.
      sparsity: s_f. One number ranks all chosen leaves together; a tree of numbers, as the paper's
        `uniform`, ranks each leaf for itself.
      end: the step of the last pruning; leave some steps after it to recover.
      begin, every: the first step, and the steps between two prunings.
      initial_sparsity: s_i.
      where: the leaves to prune; default: the weights.

    Raises:
      ValueError: a sparsity outside [0, 1), or begin not before end.

    Reference: M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv:1710.01878.

    >>> params = {"kernel": jnp.arange(10.0).reshape(2, 5)}
    >>> tx = gradual(optax.sgd(0.1), 0.8, end=2, every=1)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     grads = jax.tree.map(jnp.zeros_like, params)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["kernel"].tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 8.0, 9.0]]
    """
    check_sparsity(sparsity)
    check_sparsity(initial_sparsity)
    if not begin < end:
        raise ValueError(f"begin={begin} is due before end={end}")

    def at(final, step):
        if isinstance(final, int | float) and final == 0:
            return final  # an exempt leaf stays exactly so
        return optax.polynomial_schedule(initial_sparsity, final, 3, end - begin, begin)(step)

    def rule(key, mask, params, grads, step):
        now = jax.tree.map(lambda final: at(final, step), sparsity)
        return update_mask(key, mask, params, None, sparsity=now, where=where)

    return sparse(tx, _dense, update=rule, every=every, begin=begin, end=end)


def _dense(params: PyTree) -> Mask:
    return jax.tree.map(lambda w: jnp.ones_like(w, bool), params)


def rigl(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[[PyTree], Mask],
    *,
    every: int | Array = 100,
    end: int | Array | None = None,
    drop_rate: float | Array = 0.3,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """RigL: every few steps, drop the smallest weights and grow where the gradient is largest.

    At t = 0, every, 2 every, ... every leaf drops the share f_t = drop_rate/2 (1 + cos(pi t / end))
    of its live entries, smallest |w| first, and grows as many with the largest |dL/dw|, from zero
    and with fresh optimizer state. The sparsity of every leaf stays what it was.

    The paper skips the gradient step when it changes the mask; here the step follows with the new
    mask, so that no update and no count of the schedule is lost. A weight that is dropped and
    grown at once keeps its value, as in the authors' code.

    Args:
      tx: any optax transformation, see `sparse`.
      mask: the first mask, ``topk(random(key, params), sparsity=erk(params, 0.9))`` in the paper,
        or a function of the first params that returns it.
      every: steps between two changes.
      end: the step of the last change, in the paper 3/4 of the training; None: no end, and then
        the share does not decay.
      drop_rate: the share at the start, in [0, 1].
      where: the leaves that change; default: the weights.

    Raises:
      ValueError: a mask that does not fit params, or update without params.

    Reference: U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, "Rigging the Lottery: Making All
    Tickets Winners", arXiv:1911.11134.

    >>> params = {"kernel": jnp.array([[3.0, 1.0, 0.0]])}
    >>> tx = rigl(optax.sgd(0.1), {"kernel": jnp.array([[True, True, False]])}, drop_rate=0.5)
    >>> _, state = tx.update({"kernel": jnp.array([[0.0, 0.0, 9.0]])}, tx.init(params), params)
    >>> current(state)["kernel"].tolist()
    [[True, False, True]]
    """

    def rule(key, mask, params, grads, step):
        decay = 1.0 if end is None else (1 + jnp.cos(jnp.pi * step / end)) / 2
        rate = drop_rate * decay
        return update_mask(None, mask, params, grads, drop_rate=rate, where=where)

    return sparse(tx, mask, update=rule, every=every, end=end)
