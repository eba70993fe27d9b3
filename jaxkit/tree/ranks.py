"""Ranks of entries over a whole tree: the k largest, the k-th, quantiles, without a sort."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import _rank as rank
from jaxkit.tree.leaves import (
    Where,
    check_like,
    concrete,
    first_difference,
    flatten,
    is_array,
    select,
)

__all__ = ["kth_largest", "quantile", "topk"]


def _ranked(tree: PyTree, where: Where) -> tuple[list[Array], list[bool], int]:
    """Return the leaves to rank, the choice for every leaf, and the bits of the widest dtype."""
    bits = jax.tree.leaves(select(tree, where))
    picked = {p: x for (p, x), c in zip(flatten(tree).items(), bits, strict=True) if c}
    for path, leaf in picked.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{path!r} has dtype {leaf.dtype}, and only real numbers have an order")
        spoiled = jnp.isnan(leaf).any()
        if concrete(spoiled) and spoiled:
            raise ValueError(f"{path!r} holds NaN, which has no rank")
    wide = any(leaf.dtype == jnp.float64 for leaf in picked.values())
    return list(picked.values()), bits, 64 if wide else 32


def topk(
    scores: PyTree, k: Any, *, where: Where = None, within: PyTree[Bool[Array, "..."]] | None = None
) -> PyTree[Bool[Array, "..."]]:
    """Mark the k largest entries: exactly k, ties in the order of the flat index.

    mask_i = 1 for the k entries of the chosen leaves that come first in the order (larger score,
    earlier leaf, lower flat index); leaves that are not chosen are all True. It neither sorts nor
    gathers: 32 reductions (64 for float64) find the k-th largest score, and as many split its ties.

    Args:
      scores: floats; -0 counts as 0. NaN ranks lowest under jit and raises eagerly.
      k: an int (or a traced whole number) over all chosen leaves together, or a tree of them with
        one a leaf, each leaf for itself. More than there is marks all.
      where: the leaves that are ranked; default: `is_weight`.
      within: a mask; entries outside it are never marked.

    Raises:
      ValueError: NaN scores (eagerly), a `where` that matches nothing, a tree that does not fit.
      TypeError: complex scores.

    >>> topk({"w": jnp.array([[3.0, 1.0], [2.0, 2.0]])}, 2)["w"].tolist()
    [[True, False], [True, False]]
    """
    leaves, chosen, bits = _ranked(scores, where)
    if not leaves:
        return jax.tree.map(_all_true, scores)
    ks, structure = jax.tree.flatten(k, is_leaf=rank.is_pair)
    together = structure == jax.tree.structure(0)
    if not together:
        if structure != jax.tree.structure(scores):
            raise ValueError(f"k does not fit the scores: {first_difference(scores, k)}")
        ks = [each for each, bit in zip(ks, chosen, strict=True) if bit]
    pairs = [rank.as_pair(each) for each in ks]
    masks: list = [None] * len(leaves)
    if within is not None:
        check_like(scores, within, "mask `within`")
        masks = [m for m, bit in zip(jax.tree.leaves(within), chosen, strict=True) if bit]
    counts = rank.Pair(*(jnp.stack(words) for words in zip(*pairs, strict=True)))
    marked = iter(rank.largest(leaves, masks, counts, together, bits))
    every, structure = jax.tree.flatten(scores)
    out = [next(marked) if bit else _all_true(x) for x, bit in zip(every, chosen, strict=True)]
    return jax.tree.unflatten(structure, out)


def _all_true(leaf: Any) -> Any:
    """Return the mask of an exempt leaf; what is no array (a function) stands for itself."""
    if is_array(leaf):
        return jnp.ones_like(leaf, bool)
    return jnp.ones((), bool) if np.isscalar(leaf) else leaf


def kth_largest(tree: PyTree, k: Any, *, where: Where = None) -> Float[Array, ""]:
    """Return the k-th largest entry (k = 1, 2, ...) of the chosen leaves together, exactly.

    float32, or float64 if a chosen leaf is; NaN if there are fewer than k entries. See `topk` for
    the order, the cost and the errors.

    >>> kth_largest({"w": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 2).item()
    3.0
    """
    leaves, _, bits = _ranked(tree, where)
    return _kth(leaves, k, bits)


def _kth(leaves: list[Array], k: Any, bits: int) -> Float[Array, ""]:
    if not leaves:
        raise ValueError("no leaf is chosen, so there is no k-th largest entry")
    pair = rank.as_pair(k)
    return rank.kth(leaves, rank.Pair(pair.hi[None], pair.lo[None]), bits)


def quantile(tree: PyTree, q: Any, *, where: Where = None) -> Float[Array, ""]:
    """Return the q-quantile of the entries of the chosen leaves together, an entry itself.

    The entry of rank floor(q (n - 1)) from below, as ``numpy.quantile(..., method="lower")``; with
    a traced q the rank is computed in float32. See `topk` for the order, the cost and the errors.

    >>> quantile({"w": jnp.arange(10.0).reshape(2, 5)}, 0.5).item()
    4.0
    """
    leaves, _, bits = _ranked(tree, where)
    n = sum(leaf.size for leaf in leaves)
    if isinstance(q, int | float | np.number):
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} is not in [0, 1]")
        return _kth(leaves, n - math.floor(rank.decimal(q) * (n - 1)), bits)
    return _kth(leaves, n - jnp.floor(q * (n - 1)), bits)
