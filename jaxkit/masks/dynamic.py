"""Masks that change in training: prune, drop and grow, as rules of `sparse`.

Pruning alone is `gradual`, exchange alone is `set` (grown at random) and `rigl` (by gradient), and
both together are `granet`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.exchange import check_rate, drop_by_sign, grow, update_mask
from jaxkit.masks.score import random
from jaxkit.masks.select import Mask, check_sparsity, kept_count
from jaxkit.masks.train import Change, first_mask, sparse

First = Any  # a mask, or a function of the first params that returns it

__all__ = ["cosine", "gradual", "granet", "rigl", "set"]


# ---------------------------------------------------------------------------------- schedules


def cosine(
    step: Array | int, rate: float | Array, end: float | Array | None, last: float | Array = 0.0
) -> float | Array | Float[Array, ""]:
    """Return the drop rate at a step: from `rate` along half a cosine to `last` at `end`.

    r_t = last + (rate - last) (1 + cos(pi t / end)) / 2, and `last` after the end; `rate` itself,
    for ever, if `end` is None.

    >>> [round(float(cosine(t, 0.5, 100, 0.1)), 6) for t in (0, 50, 100, 200)]
    [0.5, 0.3, 0.1, 0.1]
    """
    if end is None:
        return rate
    return last + (rate - last) * (1 + jnp.cos(jnp.pi * jnp.minimum(step / end, 1.0))) / 2


def _cubic(sparsity: Any, step: Array, initial: Any, begin: int, end: int) -> Any:
    """Return the sparsity at a step, for a number or a tree of numbers."""

    def at(final):
        if isinstance(final, int | float) and final == 0:
            return final  # an exempt leaf stays exactly so
        return optax.polynomial_schedule(initial, final, 3, end - begin, begin)(step)

    return jax.tree.map(at, sparsity)


def _check_cubic(sparsity: Any, initial: Any, begin: Any, end: Any, every: Any) -> None:
    check_sparsity(sparsity)
    check_sparsity(initial)
    if not begin < end:
        raise ValueError(f"begin={begin} is due before end={end}")
    if isinstance(every, int) and every > end - begin:
        raise ValueError(
            f"every={every} is due within the {end - begin} steps from begin={begin} to end={end}"
        )
    for path, s in tree.flatten(sparsity).items():
        at = f" at {path!r}" if path else ""
        exempt = bool(path) and isinstance(s, int | float) and s == 0
        if not exempt and violates(lambda s, i: np.float32(s) >= np.float32(i), s, initial):
            raise ValueError(f"sparsity{at} is {s}, below initial_sparsity={initial}")


def _check_kept(params: PyTree, sparsity: Any, where: tree.Where) -> None:
    """Raise if known sparsities leave a leaf, or one of all chosen leaves, without an entry."""
    if isinstance(sparsity, int | float):
        sizes = [w.size for w in tree.chosen(params, where).values() if w.size]
        n = sum(sizes)
        kept = kept_count(sparsity, n)
        if n and kept < len(sizes):
            raise ValueError(
                f"sparsity={sparsity} keeps {kept} entries for {len(sizes)} leaves; "
                f"at most {1 - len(sizes) / n:.6g} leaves one to each"
            )
    elif jax.tree.structure(sparsity) == jax.tree.structure(params):
        pairs = zip(tree.flatten(sparsity).items(), jax.tree.leaves(params), strict=True)
        for (path, s), w in pairs:
            known = isinstance(s, int | float) and tree.is_inexact(w) and w.size
            if known and kept_count(s, w.size) < 1:
                raise ValueError(
                    f"sparsity at {path!r} is {s}, and keeps none of its {w.size} entries; "
                    f"at most {1 - 1 / w.size:.6g} keeps one"
                )


def _check_first(mask: Mask, params: PyTree, initial: Any, where: tree.Where) -> None:
    """Raise if a known mask is sparser than the first sparsity, by more than a hundredth."""
    bits = tree.chosen(params, where)
    mine = {path: m for path, m in tree.flatten(mask).items() if path in bits}
    n = sum(w.size for w in bits.values())
    if n and tree.concrete(mine, initial):
        live = sum(int(np.asarray(m).sum()) for m in mine.values())
        due = kept_count(float(initial), n)
        if live < due - 0.01 * n - len(mine):
            raise ValueError(
                f"the first mask keeps {live} of {n} entries, and initial_sparsity={initial} keeps "
                f"{due}: nothing would be pruned until the cubic is there; give the mask's sparsity"
            )


def _dense(params: PyTree) -> Mask:
    return jax.tree.map(lambda w: jnp.ones_like(w, bool), params)


# ------------------------------------------------------------------------------------ methods


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
      ValueError: a sparsity outside [0, 1) or below the first one, begin not before end; at
        `init`, a sparsity that leaves a leaf, or one of all leaves, without an entry.

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
    _check_cubic(sparsity, initial_sparsity, begin, end, 1)

    def rule(key, mask, params, grads, step):
        now = _cubic(sparsity, step, initial_sparsity, begin, end)
        return update_mask(key, mask, params, None, sparsity=now, where=where)

    def first(params):
        _check_kept(params, sparsity, where)
        return _dense(params)

    return sparse(tx, first, update=rule, every=every, begin=begin, end=end)


def rigl(
    tx: optax.GradientTransformation,
    mask: First,
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
    >>> state.mask["kernel"].tolist()
    [[True, False, True]]
    """
    check_rate(drop_rate)

    def rule(key, mask, params, grads, step):
        rate = cosine(step, drop_rate, end)
        return update_mask(None, mask, params, grads, drop_rate=rate, where=where)

    return sparse(tx, mask, update=rule, every=every, end=end)


def set(
    tx: optax.GradientTransformation,
    mask: First,
    *,
    key: PRNGKeyArray,
    every: int | Array = 100,
    end: int | Array | None = None,
    drop_rate: float | Array = 0.3,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """SET: every few steps, drop the weights nearest zero on both sides, grow as many at random.

    At t = every, 2 every, ... every leaf drops the share `drop_rate` (the paper's zeta) of its live
    positive entries, the smallest first, and of its live negative ones, the largest first; as many
    grow at random among all that are out, from zero and with fresh optimizer state. So the mask
    needs no dense gradient. (Zeros count as negative. An entry just dropped may return, with its
    value.)

    Args:
      tx: any optax transformation, see `sparse`.
      mask: the first mask, in the paper Erdős-Rényi (`erk` is the same for matrices), or a function
        of the first params that returns it.
      key: a typed key for the growth.
      every: steps between two changes, in the paper an epoch.
      end: the step of the last change; None: no end.
      drop_rate: zeta, in [0, 1].
      where: the leaves that change; default: the weights.

    Raises:
      ValueError: a mask that does not fit params, or update without params.
      TypeError: a legacy uint32 key.

    Reference: D. C. Mocanu, E. Mocanu, P. Stone, P. H. Nguyen, M. Gibescu, A. Liotta, "Scalable
    Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network
    Science", arXiv:1707.04780.

    >>> params = {"kernel": jnp.array([[3.0, 1.0, -1.0, -2.0, 0.0]])}
    >>> first = {"kernel": jnp.array([[True, True, True, True, False]])}
    >>> tx = set(optax.sgd(0.0), first, key=jax.random.key(0), every=1, drop_rate=0.5)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     _, state = tx.update(params, state, params)
    >>> state.mask["kernel"][0, jnp.array([0, 3])].tolist(), int(state.mask["kernel"].sum())
    ([True, True], 4)
    """
    check_rate(drop_rate)

    def rule(key, mask, params, grads, step):
        kept = drop_by_sign(mask, params, drop_rate, where=where)
        return grow(kept, random(key, params), mask, where=where)

    return sparse(tx, mask, update=rule, every=every, begin=every, end=end, key=key)


def granet(
    tx: optax.GradientTransformation,
    sparsity: float | Array | PyTree,
    *,
    end: int,
    steps: int | Array,
    begin: int = 0,
    every: int | Array = 100,
    mask: First = _dense,
    initial_sparsity: float | Array = 0.0,
    drop_rate: float | Array = 0.5,
    last_drop_rate: float | Array = 0.005,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """GraNet: prune gradually, and after every pruning regenerate as many weights as were dropped.

    At t = begin, begin + every, ... first `gradual`'s pruning to s_t along the cubic from begin to
    end, by |w| over all chosen leaves together; then `rigl`'s exchange in every leaf, of the share
    r_t that falls along half a cosine from drop_rate to last_drop_rate at `steps`, so also after
    the pruning has ended. What grows starts from zero with fresh optimizer state, also what the
    pruning has just taken; only an entry that the exchange drops and grows at once keeps both, as
    in `rigl` and in the authors' code.

    Dense-to-sparse is the default. Sparse-to-sparse starts at a mask with its initial_sparsity, in
    the paper ``topk(random(key, params), sparsity=erk(params, 0.5))``. Without growth (both rates
    0) it is `gradual`; with sparsity = initial_sparsity it is `rigl`.

    Counts are exact and the last pruning reaches `sparsity` (the authors' code keeps one entry
    less, stops one step short of the end of its cubic, and exchanges nothing at `begin`); a share
    is rounded, where the code takes the ceiling. Ranked together, a leaf may lose all its entries
    at extreme sparsity, which cannot be seen under jit and `report` shows; a tree of sparsities
    prevents it. To measure the plasticity of the paper, how accuracy recovers from a pruning,
    compare it before ``apply(params, mask)`` and after some epochs of ``sparse(tx, mask)``.

    Args:
      tx: any optax transformation, see `sparse`.
      sparsity: s_f, one number, or a tree of numbers that ranks each leaf for itself. (`uniform` is
        nearly the paper's variant of that name, which leaves the classifier at 0.8 from there on
        and the rest so much sparser.)
      end: the step at which the cubic reaches s_f; the first change at or after it is the last
        pruning.
      steps: all steps of the training: the end of the cosine.
      begin, every: the first change, and the steps between two changes.
      mask: the first mask, or a function of the first params that returns it.
      initial_sparsity: s_i, that of the first mask (which may be denser).
      drop_rate, last_drop_rate: the shares of the live entries that move, first and last.
      where: the leaves that change; default: the weights.

    Raises:
      ValueError: a sparsity outside [0, 1) or below the first one, a rate outside [0, 1], begin not
        before end, `every` longer than that span; at `init`, a sparsity that leaves a leaf, or one
        of all leaves, without an entry, or a mask that is sparser than initial_sparsity (if it is
        known, and one number for all leaves).

    Reference: S. Liu et al., "Sparse Training via Boosting Pruning Plasticity with
    Neuroregeneration", arXiv:2106.10404.

    >>> params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> tx = granet(optax.sgd(0.0), 0.5, end=1, steps=10, every=1, last_drop_rate=0.5)
    >>> state, grads = tx.init(params), {"kernel": jnp.array([[0.0, 0.0, 0.0, 9.0]])}
    >>> for _ in range(2):
    ...     updates, state = tx.update(grads, state, params)
    >>> state.mask["kernel"].tolist()
    [[True, False, False, True]]
    """
    _check_cubic(sparsity, initial_sparsity, begin, end, every)
    check_rate(drop_rate, last_drop_rate)
    single = jax.tree.structure(sparsity) == jax.tree.structure(0)
    pruned = not (single and violates(lambda s, i: s != i, sparsity, initial_sparsity))
    still = all(isinstance(r, int | float) and r == 0 for r in (drop_rate, last_drop_rate))

    def rule(key, mask, params, grads, step):
        now = _cubic(sparsity, step, initial_sparsity, begin, end) if pruned else None
        rate = 0.0 if still else cosine(step, drop_rate, steps, last_drop_rate)
        kept = update_mask(None, mask, params, None, sparsity=now, where=where)
        return Change(update_mask(None, kept, params, grads, drop_rate=rate, where=where), kept)

    def first(params):
        _check_kept(params, sparsity, where)
        made = first_mask(mask, params)
        tree.check_like(params, made, "mask")
        if single:
            _check_first(made, params, initial_sparsity, where)
        return made

    return sparse(tx, first, update=rule, every=every, begin=begin)
