"""The PQ index: how compressible what is left is, and the pruning that asks it how far to go."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import Mask

__all__ = ["pq_index", "sap_fraction"]

_SCOPES = ("leaf", "global", "unit")


def _norms(
    params: PyTree, mask: Mask | None, p: Any, q: Any, scope: str, where: tree.Where
) -> tuple[dict, PyTree]:
    """Return by group d, sum |w|^p, sum |w|^q, and how many w are not 0; and the choice.

    The w are divided by the group's largest.
    """
    if scope not in _SCOPES:
        raise ValueError(f"scope={scope!r}, and one of {_SCOPES} is due")
    ordered = lambda p, q: np.all((np.asarray(p) > 0) & (np.asarray(p) < np.asarray(q)))
    if tree.concrete(p, q) and not ordered(p, q):
        raise ValueError(f"p={p} and q={q}: 0 < p < q is due")
    if mask is not None:
        tree.check_like(params, mask, "mask")
    where = tree.select(params, where)
    masks = tree.flatten(jax.tree.map(lambda w: True, params) if mask is None else mask)
    sizes = {}
    for path, w in tree.chosen(params, where).items():
        sizes[path] = jnp.where(masks[path], tree.float32(jnp.abs(w)), 0)
    dims = lambda w: tuple(range(w.ndim - 1)) if scope == "unit" else None
    largest = {path: jnp.max(w, dims(w), initial=0) for path, w in sizes.items()}
    if scope == "global":
        most = jnp.max(jnp.stack([*largest.values(), jnp.float32(0)]))
        largest = dict.fromkeys(sizes, most)

    def sums(path, w):
        top = largest[path]
        w = w / jnp.where(top > 0, top, 1)
        live = jnp.broadcast_to(masks[path], w.shape)
        count = lambda bits: jnp.sum(bits, dims(w), dtype=jnp.float32)
        power = lambda r: jnp.sum(jnp.where(w > 0, w, 1) ** r * (w > 0), dims(w))
        return count(live), power(p), power(q), count(w > 0)

    found = {path: sums(path, w) for path, w in sizes.items()}
    if scope == "global":
        add = lambda i: sum((sums[i] for sums in found.values()), jnp.float32(0))
        return {"": tuple(map(add, range(4)))}, where
    return found, where


def _spread(fn: Callable, found: dict, params: PyTree, scope: str, where: PyTree[bool]) -> PyTree:
    if scope == "global":
        return fn(*found[""])
    return jax.tree.map(
        lambda bit, path: fn(*found[path]) if bit else 0.0, where, tree.paths(params)
    )


def pq_index(
    params: PyTree,
    mask: Mask | None = None,
    *,
    p: float | Array = 0.5,
    q: float | Array = 1.0,
    scope: str = "leaf",
    where: tree.Where = None,
) -> PyTree:
    """Return the PQ index, a measure of sparsity: I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q.

    w are the d live entries of a group. I is 0 if all are of one size, 1 - d^(1/q - 1/p) if all but
    one are zero, and does not change if w is scaled or doubled. Where I is high, few entries
    carry most of the norm.

    Args:
      params: any tree.
      mask: the live entries; None: all.
      p, q: the norms, 0 < p < q; may be traced.
      scope: the groups: each "leaf" for itself, all chosen leaves together ("global"), or each
        "unit", an index of a leaf's last dimension.
      where: the leaves that count; default: the weights.

    Returns:
      For "global" a number; else a tree like params with a number per leaf, or a vector of one per
      unit, and 0.0 at the other leaves. 0 where nothing is left.

    Raises:
      ValueError: p and q out of order, an unknown scope, or a mask that does not fit.

    Reference: E. Diao, G. Wang, J. Zhang, Y. Yang, J. Ding, V. Tarokh, "Pruning Deep Neural
    Networks from a Sparsity Perspective", arXiv:2302.05601.

    >>> index = pq_index({"kernel": jnp.array([[1.0, -1.0, 0.0, 0.0]])})
    >>> round(float(index["kernel"]), 5)
    0.5
    """
    found, where = _norms(params, mask, p, q, scope, where)

    def index(d, sp, sq, _):
        d, sp, sq = (jnp.where(sq > 0, x, 1) for x in (d, sp, sq))
        return jnp.maximum(1 - (sp / d) ** (1 / p) / (sq / d) ** (1 / q), 0)

    return _spread(index, found, params, scope, where)


def sap_fraction(
    params: PyTree,
    mask: Mask | None = None,
    *,
    p: float | Array = 0.5,
    q: float | Array = 1.0,
    eta: float | Array = 0.0,
    gamma: float | Array = 1.0,
    beta: float | Array = 0.9,
    scope: str = "leaf",
    where: tree.Where = None,
) -> PyTree:
    """Return how much of what is live to prune next, by its PQ index: sparsity-informed pruning.

    r = ceil(d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))) is a lower bound on the entries to
    retain out of d live ones, and the fraction is floor(d clip(gamma (1 - r / d), 0, beta)) / d. It
    is 0 if all entries are of one size. (In float32, whence r is uncertain by about 1e-6 d where
    they are not.) A round of the paper trains, prunes by it and rewinds::

        mask = prune(mask, magnitude(trained), sap_fraction(trained, mask))

    which is the `rule` of `tickets`: ``lambda mask, trained: prune(mask, magnitude(trained),
    sap_fraction(trained, mask))``. (The paper takes the best checkpoint of the round as `trained`.)

    Args:
      params: the params after training.
      mask: the live entries; None: all.
      p, q, scope, where: as for `pq_index`.
      eta: how much of the norm may be lost, at least 0; the more, the bolder.
      gamma: a factor of the fraction.
      beta: the most that goes at once, in [0, 1).

    Returns:
      For "global" a number and for "leaf" a tree of numbers, 0.0 at other leaves: both as `prune`
      takes them. For "unit" a tree with a vector per leaf, for ``jax.vmap(prune)`` over its units.

    Raises:
      ValueError: beta outside [0, 1), and what `pq_index` raises.

    Reference: E. Diao, G. Wang, J. Zhang, Y. Yang, J. Ding, V. Tarokh, "Pruning Deep Neural
    Networks from a Sparsity Perspective", arXiv:2302.05601.

    >>> fraction = sap_fraction({"kernel": jnp.array([[1.0, -1.0, 0.0, 0.0]])})
    >>> float(fraction["kernel"])
    0.5
    """
    if violates(lambda b: (b >= 0) & (b < 1), beta):
        raise ValueError(f"beta={beta}: a share in [0, 1) is due, or everything could go at once")
    found, where = _norms(params, mask, p, q, scope, where)

    def fraction(d, sp, sq, k):
        some = sq > 0
        sp, sq, k = (jnp.where(some, x, 1) for x in (sp, sq, k))
        # d (1 - I)^(pq / (q - p)) = (sp^q / sq^p)^(1 / (q - p)), in means over the k entries that
        # are not 0: these are 1 if all are of one size, and the bound is k exactly
        mean = (q * jnp.log(sp / k) - p * jnp.log(sq / k) - q * jnp.log1p(eta)) / (q - p)
        r = jnp.ceil(k * jnp.exp(mean))
        count = jnp.clip(gamma * (d - r), 0, beta * d)
        # a product that is whole may come out a little below itself
        count = jnp.floor(count + jnp.minimum(count * 2.0**-22, 0.2))
        return jnp.where(some, count / jnp.maximum(d, 1), 0)

    return _spread(fraction, found, params, scope, where)
