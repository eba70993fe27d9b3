"""Grafting: the entries of one model in another, and how masks overlap."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit.masks.score import movement
from jaxkit.masks.select import Mask, topk

__all__ = ["graft", "most_moved", "only", "overlap"]


def graft(params: PyTree, tuned: PyTree, mask: Mask) -> PyTree:
    """Put a fine-tuned model's entries into another one: where(mask, w_ft, w_pre), to the bit.

    The graft of several tasks is that of the union of their masks, one after the other. Leaves that
    are not inexact arrays are those of `params`.

    Args:
      params: the pretrained params.
      tuned: the fine-tuned ones.
      mask: a tree of bools like params: True takes the fine-tuned value. A mask of `topk` is True
        at all leaves that were not chosen; one of `most_moved` is False there.

    Raises:
      ValueError: trees that do not fit, naming the first path that differs.
      TypeError: a leaf of another dtype, by path.

    Reference: A. Panigrahi, N. Saunshi, H. Zhao, S. Arora, "Task-Specific Skill Localization in
    Fine-tuned Language Models", arXiv:2302.06600.

    >>> mask = {"w": jnp.array([True, False])}
    >>> graft({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, mask)["w"].tolist()
    [1.0, 0.0]
    """
    tree.check_like(params, tuned, "fine-tuned tree")
    tree.check_like(params, mask, "mask")
    other = tree.flatten(tuned)
    for path, w in tree.flatten(params).items():
        if tree.is_inexact(w) and w.dtype != other[path].dtype:
            raise TypeError(f"{path!r} is {w.dtype} here and {other[path].dtype} in the other tree")
    put = lambda w, v, m: jnp.where(m, v, w) if tree.is_inexact(w) else w
    return jax.tree.map(put, params, tuned, mask)


def most_moved(
    after: PyTree,
    before: PyTree,
    *,
    keep: int | Array | None = None,
    sparsity: float | Array | None = None,
    where: tree.Where = None,
    within: Mask | None = None,
) -> Mask:
    """Mark the entries that moved most, all chosen leaves ranked together, and no other leaf.

    `topk` of `movement`, but False at leaves that were not chosen: the base patch of a graft, or
    the entries of a sparse fine-tuning.

    Args:
      after, before: two params.
      keep, sparsity: how many are marked, as in `topk`.
      where: the leaves to choose from; default: the weights. Leaves that did not move at all (tied
        or frozen ones) count in the sparsity: leave them out.
      within: a mask of what may be marked.

    Warns:
      If a chosen leaf did not move at all (eagerly).

    Raises:
      ValueError: trees that do not fit, and what `topk` raises.

    >>> before = {"w": jnp.zeros((1, 3)), "bias": jnp.zeros(3)}
    >>> after = {"w": jnp.array([[0.1, -3.0, 2.0]]), "bias": jnp.ones(3)}
    >>> mask = most_moved(after, before, keep=2)
    >>> mask["w"].tolist(), mask["bias"].tolist()
    ([[False, True, True]], [False, False, False])
    """
    moved, chosen = movement(after, before), tree.select(before, where)
    if tree.concrete(moved):
        still = [p for p, m in tree.chosen(moved, chosen).items() if m.size and not np.any(m)]
        if still:
            warnings.warn(f"{still} did not move and count: leave them out (where)", stacklevel=2)
    return only(topk(moved, keep=keep, sparsity=sparsity, where=chosen, within=within), chosen)


def only(mask: Mask, where: PyTree[bool]) -> Mask:
    """Make a mask False at the leaves that were not chosen."""
    none = lambda m: jnp.zeros_like(m, bool) if tree.is_array(m) else m
    return jax.tree.map(lambda bit, m: m if bit else none(m), where, mask)


def overlap(a: Mask, b: Mask, *, where: tree.Where = None) -> Float[Array, ""]:
    """Return how far two masks overlap: |a & b| / min(|a|, |b|) over the chosen leaves.

    1 where one lies within the other, about the density of the larger one for independent masks,
    nan where one is empty.

    Args:
      a, b: trees of bools of one structure.
      where: the leaves that count, as for params of these shapes; default: the weights.

    Raises:
      ValueError: masks that do not fit each other.

    >>> a, b = {"w": jnp.array([[True, True, False]])}, {"w": jnp.array([[False, True, False]])}
    >>> float(overlap(a, b))
    1.0
    """
    tree.check_like(a, b, "second mask")
    floats = lambda t: jax.tree.map(lambda m: jnp.float32(m) if tree.is_array(m) else m, t)
    pairs = [tree.chosen(floats(t), where) for t in (a, b, jax.tree.map(jnp.logical_and, a, b))]
    left, right, both = (sum((m.sum() for m in t.values()), jnp.float32(0)) for t in pairs)
    return both / jnp.minimum(left, right)
