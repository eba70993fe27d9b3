"""The exchange of entries: some live ones drop out, and as many dead ones grow.

`update_mask` is one step of dynamic sparse training: prune to a sparsity, then exchange a share of
what is left. It is a pure function for those who carry the mask themselves; `gradual`, `set`,
`rigl` and `granet` are its optimizers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.score import magnitude, random
from jaxkit.masks.select import Mask, prune, topk

__all__ = [
    "check_rate",
    "drop_by_sign",
    "drop_each",
    "drop_halves",
    "drop_up",
    "grow",
    "regrow",
    "update_mask",
]


def grow(
    mask: Mask,
    growth: PyTree,
    like: Mask,
    *,
    where: tree.Where = None,
    into: Mask | None = None,
) -> Mask:
    """Grow every leaf to as many live entries as it has in another mask: the best that are out.

    Args:
      mask: a tree of bools like params, what stays.
      growth: what dead entries promise, like params.
      like: the mask whose count is due, leaf by leaf (before something was dropped, say).
      where: the leaves that grow; default: the weights.
      into: a mask of what may grow. If that is not enough room, fewer come in.

    >>> mask, like = {"w": jnp.array([True, False, False])}, {"w": jnp.array([True, True, False])}
    >>> grow(mask, {"w": jnp.array([9.0, 1.0, 2.0])}, like, where="w")["w"].tolist()
    [True, False, True]
    """
    due = jax.tree.map(lambda new, old: rank.minus(rank.count(old), rank.count(new)), mask, like)
    out = jax.tree.map(jnp.logical_not, mask)
    if into is not None:
        out = jax.tree.map(jnp.logical_and, out, into)
    grown = tree.topk(growth, due, where=where, within=out)
    chosen = tree.select(growth, where)
    return jax.tree.map(lambda bit, m, g: m | g if bit else m, chosen, mask, grown)


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

    Raises:
      ValueError: a drop_rate outside [0, 1], and trees that do not fit.

    >>> mask = {"w": jnp.array([[True, True, False, False]])}
    >>> scores, growth = {"w": jnp.array([[3.0, 1.0, 0, 0]])}, {"w": jnp.array([[0.0, 1, 2, 5]])}
    >>> regrow(mask, scores, growth, drop_rate=0.5)["w"].tolist()
    [[True, False, False, True]]
    """
    check_rate(drop_rate)
    return grow(drop_each(mask, scores, drop_rate, where=where), growth, mask, where=where)


def drop_each(
    mask: Mask, scores: PyTree, drop_rate: float | Array, *, where: tree.Where = None
) -> Mask:
    """Prune every chosen leaf for itself by the same share."""
    rates = jax.tree.map(lambda _: drop_rate, scores)
    return prune(mask, scores, rates, where=tree.select(scores, where))


def drop_by_sign(
    mask: Mask, params: PyTree, drop_rate: float | Array, *, where: tree.Where = None
) -> Mask:
    """Drop a share of the positive live entries and of the others, those nearest zero, by leaf."""
    chosen = tree.select(params, where)
    positive = jax.tree.map(lambda m, w: m & (w > 0) if tree.is_inexact(w) else m, mask, params)
    other = jax.tree.map(lambda m, w: m & ~(w > 0) if tree.is_inexact(w) else m, mask, params)
    sides = [
        drop_each(side, magnitude(params), drop_rate, where=chosen) for side in (positive, other)
    ]
    return jax.tree.map(jnp.logical_or, *sides)


def drop_up(
    mask: Mask, scores: PyTree, drop_rate: float | Array, *, where: tree.Where = None
) -> Mask:
    """Drop ceil(drop_rate n) of the n live entries of every leaf, those with the lowest scores."""
    chosen = tree.select(scores, where)
    left = lambda bit, m: rank.minus(rank.count(m), _ceil(drop_rate, m)) if bit else 0
    return _keep(mask, scores, jax.tree.map(left, chosen, mask), chosen)


def drop_halves(
    mask: Mask, params: PyTree, drop_rate: float | Array, *, where: tree.Where = None
) -> Mask:
    """Drop ceil(drop_rate n) of the n live entries of every leaf, those nearest zero on both sides.

    Half of them, rounded down, are positive; a side with fewer leaves it to the other.
    """
    chosen = tree.select(params, where)
    every = lambda f, *trees: jax.tree.map(lambda bit, *x: f(*x) if bit else x[0], chosen, *trees)
    sides = (
        every(lambda m, w: m & (w > 0), mask, params),
        every(lambda m, w: m & ~(w > 0), mask, params),
    )

    def shares(m, up, down):
        """Return how many of either side leave."""
        due, ups, downs = _ceil(drop_rate, m).lo, rank.count(up).lo, rank.count(down).lo
        below = jnp.minimum(due - jnp.minimum(due // 2, ups), downs)
        return due - below, below

    kept = []
    for i, side in enumerate(sides):
        left = lambda m, up, down, own, i=i: rank.count(own).lo - shares(m, up, down)[i]
        keep = every(left, mask, *sides, side)
        kept.append(_keep(side, magnitude(params), keep, chosen))
    return every(jnp.logical_or, *kept)


def _ceil(share: float | Array, mask: Array) -> rank.Pair:
    """Return ceil(share n) for n live entries, in float32 without the last bit of the product."""
    n = rank.count(mask)
    return rank.as_pair(jnp.ceil(share * (n.hi * jnp.float32(2**32) + n.lo) * (1 - 2**-22)))


def _keep(mask: Mask, scores: PyTree, keep: PyTree, chosen: PyTree[bool]) -> Mask:
    kept = tree.topk(scores, keep, where=chosen, within=mask)
    return jax.tree.map(lambda bit, k, m: k if bit else m, chosen, kept, mask)


def check_rate(*rates: float | Array) -> None:
    """Raise unless every known number is a share, in [0, 1]."""
    for rate in rates:
        if violates(lambda r: (r >= 0) & (r <= 1), rate):
            raise ValueError(f"drop_rate is {rate}, and a share in [0, 1] is due")


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
    at random. The first alone is gradual magnitude pruning, the second alone RigL, both GraNet.

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
