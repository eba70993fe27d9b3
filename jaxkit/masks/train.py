"""Sparse training: an optax transformation that keeps pruned entries at exactly zero.

`sparse` is the primitive: it wraps any optax transformation, carries the mask in its state, and
may let a rule change the mask every few steps; `constrain` is the same with entries outside the
mask frozen as they are. Methods are rules: `gradual` prunes, `rigl` drops and grows. No hook in
the train step: gradients of the loss at the (masked) params go in, dense, and
``optax.apply_updates`` leaves exact zeros.

The wrapped transformation sees the sparse problem: gradients and params are masked on the way in,
so that global-norm clipping, trust ratios and preconditioners measure what is there.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask, keep_where

Rule = Callable[..., Any]
"""``rule(key, mask, params, grads, step) -> mask``, and with a `Memory` a sixth argument.

Or -> `Change`, where entries leave and come back at once.
"""

__all__ = [
    "Change",
    "ConstrainState",
    "Memory",
    "Rule",
    "SparseState",
    "constrain",
    "current",
    "hold",
    "sparse",
]


class Change(NamedTuple):
    """What a rule may return in place of a mask: the mask, and one of what was never out.

    An entry in the mask that is not in `stayed` starts anew, as one that comes in.
    """

    mask: Mask
    stayed: Mask


class Memory(NamedTuple):
    """What a rule remembers from step to step: a pair of functions.

    init: ``init(params, mask) -> memory``, any tree of arrays.
    update: ``update(memory, mask, grads) -> memory``, at every step, before the rule is asked. The
      mask is the one in force, the gradient dense.
    """

    init: Callable[[PyTree, Mask], PyTree]
    update: Callable[[PyTree, Mask, PyTree], PyTree]


class SparseState(NamedTuple):
    """The state of `sparse`: updates seen, mask in force, wrapped state, key, the rule's memory."""

    step: Int[Array, ""]
    mask: Mask
    inner: Any
    key: PRNGKeyArray | None
    memory: PyTree = None


class ConstrainState(NamedTuple):
    """The state of `constrain`, field by field that of `sparse`."""

    step: Int[Array, ""]
    mask: Mask
    inner: Any
    key: PRNGKeyArray | None
    memory: PyTree = None


def first_mask(mask: Mask | Callable[[PyTree], Mask], params: PyTree) -> Mask:
    """Return the mask, or what it makes of the params if it is a function.

    (A module of Equinox can be called, too, and is a tree.)
    """
    made = callable(mask) and jax.tree_util.all_leaves([mask])
    return mask(params) if made else mask


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
    memory: Memory | None = None,
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
        the steps begin, begin + every, ... and end, with the dense gradient, before the update.
        Entries that come in start from zero. The state of `tx` is initialized anew at those that
        change sides, in all arrays of the leaf's shape (so also in the factors of a matrix
        preconditioner, if the leaf is square). An entry that goes out and comes back in one change
        has not changed sides, unless the rule says so with a `Change`.
      every, begin, end: when; traced numbers are fine.
      key: a typed key for rules that draw; each call of the rule gets ``fold_in(key, step)``.
      memory: what the rule remembers; it gets that as its sixth argument.

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
    return _masked(SparseState, lambda w: -w, tx, mask, update, every, begin, end, key, memory)


def constrain(
    tx: optax.GradientTransformation,
    mask: Mask | Callable[[PyTree], Mask],
    *,
    update: Rule | None = None,
    every: int | Array = 1,
    begin: int | Array = 0,
    end: int | Array | None = None,
    key: PRNGKeyArray | None = None,
    memory: Memory | None = None,
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
      every, begin, end, key, memory: as in `sparse`.

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
    return _masked(ConstrainState, frozen, tx, mask, update, every, begin, end, key, memory)


def _masked(kind, outside, tx, mask, update, every, begin, end, key, memory):
    """Wrap `tx`: what goes in is masked, and outside the mask goes out ``outside(w)``.

    Entries that come in are moved by ``outside(w)`` first: to zero, or not at all.
    """
    inner_tx = optax.with_extra_args_support(tx)
    if key is not None:
        tree.check_key(key)

    def init(params):
        first = _fit(first_mask(mask, params) if jax.tree.leaves(params) else mask, params)
        seen = None if memory is None else memory.init(params, first)
        return kind(jnp.zeros((), jnp.int32), first, tx.init(params), key, seen)

    def change(state, params, grads, seen):
        folded = None if state.key is None else jax.random.fold_in(state.key, state.step)
        last = () if memory is None else (seen,)
        new = update(folded, state.mask, params, grads, state.step, *last)
        new, stayed = new if isinstance(new, Change) else (new, new)
        old = jax.tree.map(_all, state.mask, stayed, new)
        moved = jax.tree.map(lambda a, b, o: (a != o) | (b != o), state.mask, new, old)
        return new, old, _renew(tx, state.inner, moved, keep_where(new, start_of(params, old)))

    def start_of(params, old):
        begun = lambda w, o: jnp.where(o, w, w + outside(w)) if tree.is_inexact(w) else w
        return jax.tree.map(begun, params, old)

    def step(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("a mask needs the params: tx.update(grads, state, params)")
        now, inner, seen = state.mask, state.inner, state.memory
        old, start = now, params
        if memory is not None:
            seen = memory.update(seen, now, updates)
        if update is not None:
            due = (state.step >= begin) & ((state.step - begin) % every == 0)
            if end is not None:
                due = (due & (state.step < end)) | (state.step == end)
            same = lambda state, *_: (state.mask, state.mask, state.inner)
            now, old, inner = jax.lax.cond(due, change, same, state, params, updates, seen)
            start = start_of(params, old)
        updates, inner = inner_tx.update(
            keep_where(now, updates), inner, keep_where(now, start), **extra
        )

        def split(u, w, m, o):
            if not tree.is_inexact(w):
                return u
            # in the wider of the two dtypes, or w - w would not be 0
            u = u if update is None else jnp.where(o, u, u + outside(w))
            return jnp.where(m, u, outside(w))

        updates = jax.tree.map(split, updates, params, now, old)
        count = jnp.asarray(optax.safe_increment(state.step))
        return updates, kind(count, now, inner, state.key, seen)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, step))


def _all(*masks: Any) -> Any:
    """Return what is in all masks of a leaf, if it has any."""
    return reduce(jnp.logical_and, masks) if masks[0].dtype == bool else masks[0]


def _renew(tx, state, changed: Mask, params: PyTree) -> optax.OptState:
    """Initialize the state of `tx` anew at the entries that changed."""
    # (bools are the masks of wrappers inside, which have rules of their own)
    own = lambda s: tree.is_array(s) and s.dtype != bool
    masked = lambda s: isinstance(s, optax.MaskedNode)
    here = lambda s, c: c if own(s) and jnp.shape(s) == jnp.shape(c) else False

    rest = lambda part: jax.tree.map(lambda _: False, part)

    def mark(part):  # what stands where params do; statistics of another structure stay
        if jax.tree.structure(part, is_leaf=masked) != jax.tree.structure(changed):
            return rest(part)
        return jax.tree.map(
            lambda s, c: s if masked(s) else here(s, c), part, changed, is_leaf=masked
        )

    marks = optax.tree_utils.tree_map_params(
        tx, mark, state, transform_non_params=rest, is_leaf=lambda _: True
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
