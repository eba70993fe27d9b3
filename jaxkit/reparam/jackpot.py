"""Lottery jackpots: a mask over frozen, pretrained weights, found by swaps from a first mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import Mask
from jaxkit.reparam.core import Reparam, Theta, matched
from jaxkit.reparam.supermask import supermask

__all__ = ["jackpots", "swap"]


def jackpots(mask: Mask, *, where: tree.Where = None) -> Reparam:
    """Train scores over frozen weights under a mask that only `swap` changes: w_eff = w mask.

    dL/ds = dL/dw_eff w at all entries, masked or not. Scores start at 1 where the mask is True and
    at 0.99 elsewhere, so that a small change is enough to swap. The mask is carried by the train
    loop, for it depends on its past; after every step::

        r = jackpots(mask)                          # in the loss: mask may be traced
        theta = optax.apply_updates(theta, updates)
        mask = swap(mask, theta, rho(step))

    The paper starts at the magnitude mask of one threshold over all leaves, but for the last layer,
    and restricts the swaps more and more: ``rho = optax.polynomial_schedule(1.0, 0.0, 4, steps)``,
    or ``optax.cosine_decay_schedule(1.0, steps)``.

    Args:
      mask: a tree of bools like params, such as ``masks.topk(masks.magnitude(params), ...)``.
      where: the leaves whose mask is searched; default: the weights. Others are not masked.

    Raises:
      ValueError: a mask that does not fit; a leaf that it masks whole.

    Reference: Y. Zhang, M. Lin, Y. Zhong, F. Chao, R. Ji, "Lottery Jackpots Exist in Pre-trained
    Models", arXiv:2104.08700. (In one of its scripts the fourth power is rounded up to 1, which
    restricts nothing.)

    >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
    >>> r = jackpots({"kernel": jnp.array([[True, False]])})
    >>> theta = r.init(jax.random.key(0), params)
    >>> theta["kernel"].tolist(), r.apply(theta, params)["kernel"].tolist()
    ([[1.0, 0.9900000095367432]], [[3.0, 0.0]])
    """
    own = tree.flatten(mask)
    zeros = jax.nn.initializers.zeros
    frozen = supermask(zeros, lambda z: {path: own[path] for path in z}, where=where)

    def init(key: PRNGKeyArray, params: PyTree) -> Theta:
        tree.check_like(params, mask, "mask")
        theta = frozen.init(key, params)
        start = lambda path, s: jnp.where(own[path], 1.0, 0.99).astype(s.dtype)
        return {path: start(path, s) for path, s in theta.items()}

    def apply(theta: Theta, params: PyTree) -> PyTree:
        tree.check_like(params, mask, "mask")
        return frozen.apply(theta, params)

    return Reparam(init, apply)


def swap(mask: Mask, theta: Theta, rho: float | Array = 1.0) -> Mask:
    """Swap masked entries with high scores for live ones with low scores, leaf by leaf.

    With t the k-th smallest score of a leaf with k masked entries, the c masked entries above t
    could enter, and at least as many live ones, at or below t, leave. The ceil(rho c) largest of
    the former take the place of as many smallest of the latter, so the counts stay. rho = 1 without
    ties gives the mask of the largest scores; a rho that is small but not 0 swaps one pair; 0 none.

    Args:
      mask: the mask in force, a tree like params.
      theta: scores by path, of `jackpots`; masks of leaves without scores stay as they are.
      rho: the share of the candidates that may swap, in [0, 1]; it may be traced.

    Raises:
      ValueError: rho outside [0, 1], or a score that belongs to no leaf.

    Reference: as for `jackpots`. (Its code does not swap at all where ties at t leave more
    candidates than places; nothing but strict improvements is swapped here as well.)

    >>> mask = {"w": jnp.array([[True, True, False, False]])}
    >>> swap(mask, {"w": jnp.array([[0.1, 0.8, 0.9, 0.0]])})["w"].tolist()
    [[False, True, True, False]]
    """
    if violates(lambda r: (r >= 0) & (r <= 1), rho):
        raise ValueError(f"rho is {rho}, and a share in [0, 1] was due")
    live, every = matched(mask, theta), dict.fromkeys(theta, True)
    scores = dict(theta)
    count = {path: m.sum() for path, m in live.items()}
    best = tree.topk(scores, count, where=every)
    lowest = lambda s: jnp.finfo(s.dtype).min
    at = lambda b, s: jnp.max(s, initial=lowest(s), where=~b)
    t = jax.tree.map(at, best, scores)
    dead = jax.tree.map(jnp.logical_not, live)
    able = jax.tree.map(lambda d, s, t: (d & (s > t)).sum(), dead, scores, t)
    moved = jax.tree.map(lambda c: jnp.ceil(jnp.float32(rho) * c), able)
    enter = tree.topk(scores, moved, where=every, within=dead)
    leave = tree.topk(jax.tree.map(jnp.negative, scores), moved, where=every, within=live)
    new = {path: (m & ~leave[path]) | enter[path] for path, m in live.items()}
    paths = tree.paths(mask)
    return jax.tree.map(lambda path, m: new.get(path, m), paths, mask)
