"""Selection: from scores and sparsity to a mask, and the mask to params.

A mask is a tree like params with boolean leaves; a leaf that was not chosen is all True. Counts
are exact, ties keep the lower index.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit._known import violates

Mask = PyTree[Bool[Array, "..."]]

__all__ = ["Mask", "apply", "check_sparsity", "prune", "topk"]


def check_sparsity(sparsity: Any) -> None:
    """Raise unless every number is a sparsity: in [0, 1). Traced values are not looked at.

    Raises:
      ValueError: naming the leaf, if it is a tree of them.
    """
    for path, s in tree.flatten(sparsity).items():
        if violates(lambda s: (s >= 0) & (s < 1), s):
            at = f" at {path!r}" if path else ""
            hint = "; a mask with these ratios empties the leaf: masks.connect it first"
            raise ValueError(
                f"sparsity{at} is {s}, and a number in [0, 1) is due: the fraction of zeros"
                + (hint if path and np.all(np.asarray(s) == 1) else "")
            )


def kept_count(sparsity: Any, n: int) -> Any:
    """Return round-half-even((1 - sparsity) n), exactly if `sparsity` is a Python number."""
    if isinstance(sparsity, int | float | np.number):
        return round((1 - rank.decimal(sparsity)) * n)
    sparsity = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1)
    if n < 2**24:
        return jnp.round((1 - sparsity) * n)
    # float32 does not hold n, and sparsity 0 must keep all of it
    return rank.minus(rank.as_pair(n), rank.as_pair(jnp.round(sparsity * n)))


def topk(
    scores: PyTree,
    *,
    sparsity: float | Array | PyTree | None = None,
    keep: int | Array | PyTree | None = None,
    where: tree.Where = None,
    within: Mask | None = None,
) -> Mask:
    """Keep the entries with the largest scores, exactly round-half-even((1 - sparsity) n) of them.

    Args:
      scores: a tree like params of floats (`magnitude`, `random`, `snip`, or your own).
      sparsity: the fraction of zeros, in [0, 1). One number ranks all chosen leaves together; a
        tree of numbers (`uniform`, `erk`) ranks each leaf for itself. Python numbers count exactly;
        traced ones work under jit and vmap, are off by an entry or two at 1e8 entries, and are
        clipped to [0, 1]: from 1 on nothing is kept.
      keep: instead of sparsity, how many entries stay: an integer, or a tree of them.
      where: the leaves to sparsify. Default: the weights if there is one number, and every leaf
        whose sparsity is not 0 if there is a tree of them.
      within: a mask: entries outside it are never kept. So masks nest:
        ``topk(scores, sparsity=0.9, within=mask)``.

    Returns:
      A tree of bools like `scores`, all True at leaves that were not chosen. Ties keep the earlier
      leaf and the lower flat index. NaN ranks lowest under jit.

    Raises:
      ValueError: sparsity outside [0, 1), both or neither of sparsity and keep, a `where` that
        matches nothing, a tree that does not fit the scores, scores with NaN (eagerly).

    >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
    >>> topk(jax.tree.map(jnp.abs, params), sparsity=0.5)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    if (sparsity is None) == (keep is None):
        raise ValueError("give either sparsity (the fraction of zeros) or keep (the number kept)")
    given = sparsity if keep is None else keep
    single = jax.tree.structure(given) == jax.tree.structure(0)
    if not single and jax.tree.structure(given) != jax.tree.structure(scores):
        tree.check_like(scores, given, "sparsity" if keep is None else "keep")
    if where is None and not single:
        where = jax.tree.map(_is_float_array, scores)
    if keep is None:
        check_sparsity(sparsity)
        if single:
            chosen = jax.tree.leaves(tree.select(scores, where))
            pairs = zip(jax.tree.leaves(scores), chosen, strict=True)
            keep = kept_count(sparsity, sum(leaf.size for leaf, bit in pairs if bit))
        else:
            keep = jax.tree.map(lambda s, leaf: kept_count(s, np.size(leaf)), sparsity, scores)
    return tree.topk(scores, keep, where=where, within=within)


def prune(
    mask: Mask, scores: PyTree, fraction: float | Array | PyTree, *, where: tree.Where = None
) -> Mask:
    """Prune a fraction of what is still there: the live entries with the lowest scores leave.

    Of n live entries n - round-half-even(fraction n) stay, so that after r rounds of a mask of ones
    about (1 - fraction)^r of it is left. The new mask lies within the old one.

    Args:
      mask: a tree of bools like params.
      scores: what the live entries are worth, like params (`magnitude` of trained params, say).
      fraction: in [0, 1]. One number ranks the live entries of all chosen leaves together; a tree
        of numbers ranks each leaf for itself. Counts are exact for Python numbers of up to four
        digits, and those of float32 for others and for traced ones.
      where: the leaves to prune. Default: the weights if there is one number, and every leaf if
        there is a tree of them.

    Raises:
      ValueError: a fraction outside [0, 1], a tree that does not fit, and what `topk` raises.

    >>> mask = {"w": jnp.array([[True, True, False, True, True]])}
    >>> scores = {"w": jnp.array([[4.0, 1.0, 9.0, 2.0, 3.0]])}
    >>> prune(mask, scores, 0.5)["w"].tolist()
    [[True, False, False, False, True]]
    """
    tree.check_like(scores, mask, "mask")
    for path, p in tree.flatten(fraction).items():
        if violates(lambda p: (p >= 0) & (p <= 1), p):
            at = f" at {path!r}" if path else ""
            raise ValueError(f"fraction{at} is {p}, and a share of the live entries is due: [0, 1]")
    single = jax.tree.structure(fraction) == jax.tree.structure(0)
    if not single and jax.tree.structure(fraction) != jax.tree.structure(scores):
        tree.check_like(scores, fraction, "fraction")
    if where is None and not single:
        where = jax.tree.map(_is_float_array, scores)
    chosen = tree.select(scores, where)
    left = lambda n, p: rank.minus(n, rank.share(n, p))
    if single:
        pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(chosen), strict=True)
        keep = left(rank.total([m for m, bit in pairs if bit]), fraction)
    else:
        count = lambda bit, m, p: left(rank.count(m), p) if bit else 0
        keep = jax.tree.map(count, chosen, mask, fraction)
    kept = tree.topk(scores, keep, where=chosen, within=mask)
    return jax.tree.map(lambda bit, k, m: k if bit else m, chosen, kept, mask)


def _is_float_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def apply(params: PyTree, mask: Mask) -> PyTree:
    """Return the params with zeros outside the mask: where(mask, w, 0), in the dtype of w.

    (Not a product: NaN times 0 is NaN.) Leaves that are not inexact arrays pass through.

    Raises:
      ValueError: a mask that does not fit, naming the first path that differs.

    >>> apply({"w": jnp.array([3.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
    [3.0, 0.0]
    """
    tree.check_like(params, mask, "mask")
    return keep_where(mask, params)


def keep_where(mask: Mask, params: PyTree) -> PyTree:
    """Do what `apply` does, unchecked."""
    return jax.tree.map(
        lambda w, m: jnp.where(m, w, jnp.zeros_like(w)) if tree.is_inexact(w) else w, params, mask
    )
