"""Allocations: how sparse each leaf is, given how sparse they are together.

An allocation is a tree like params of sparsities: the sum of (1 - s_l) n_l over the chosen leaves
is (1 - sparsity) times the sum of n_l, and leaves that are not chosen have 0. Hand it to `topk`. No
allocation is one too: a single number makes `topk` rank all chosen leaves together.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit import tree
from jaxkit.masks.select import check_sparsity

__all__ = ["erk", "uniform"]


def _spread(params: PyTree, where: tree.Where, sparsities: Callable[[list], Any]) -> PyTree:
    """Return the tree with the chosen leaves' sparsities and 0 at every other leaf."""
    chosen = jax.tree.leaves(tree.select(params, where))
    leaves, structure = jax.tree.flatten(params)
    shapes = [leaf.shape for leaf, bit in zip(leaves, chosen, strict=True) if bit and leaf.size]
    values = iter(sparsities(shapes))
    out = [
        next(values) if bit and leaf.size else 0.0 for leaf, bit in zip(leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(structure, out)


def uniform(params: PyTree, sparsity: float | Array, *, where: tree.Where = None) -> PyTree:
    """Give every chosen leaf the same sparsity: s_l = sparsity.

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number or a traced scalar.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), or a `where` that matches nothing.

    >>> uniform({"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}, 0.9)
    {'bias': 0.0, 'kernel': 0.9}
    """
    check_sparsity(sparsity)
    return _spread(params, where, lambda shapes: [sparsity] * len(shapes))


def erk(params: PyTree, sparsity: float | Array, *, where: tree.Where = None) -> PyTree:
    """Erdős-Rényi-Kernel: thin leaves stay denser. 1 - s_l = min(1, eps * sum(shape_l) / n_l).

    eps solves sum_l (1 - s_l) n_l = (1 - sparsity) sum_l n_l: leaves that would exceed density 1
    are dense, the largest ratio first, and the others share the rest.

    Args:
      params: any tree (only shapes are read; every dimension counts, kernel sizes too).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), or a `where` that matches nothing.

    Reference: U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, "Rigging the Lottery: Making
    All Tickets Winners", arXiv:1911.11134, after the Erdős-Rényi graphs of D. C. Mocanu et al.,
    "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
    Network Science", arXiv:1707.04780.

    >>> params = {"w0": jnp.ones((784, 300)), "w1": jnp.ones((300, 100)), "w2": jnp.ones((100, 10))}
    >>> {path: round(s, 6) for path, s in erk(params, 0.9).items()}
    {'w0': 0.920432, 'w1': 0.769811, 'w2': 0.0}
    """
    check_sparsity(sparsity)
    xp: Any = jnp if isinstance(sparsity, jax.Array) else np

    def sparsities(shapes):
        if not shapes:
            return []
        sizes = np.array([math.prod(shape) for shape in shapes], np.float64)
        ratios = np.array([sum(shape) for shape in shapes]) / sizes
        order = np.argsort(-ratios, kind="stable")
        n, raw = sizes[order], (ratios * sizes)[order]
        # with the first j leaves dense, the others share what is left of the budget
        dense = np.concatenate([[0.0], np.cumsum(n)[:-1]])
        share = np.cumsum(raw[::-1])[::-1]
        eps = ((1 - sparsity) * n.sum() - dense) / share
        feasible = eps * ratios[order] <= 1
        first = xp.argmax(xp.asarray(feasible))
        density = xp.where(xp.arange(len(n)) < first, 1.0, xp.asarray(eps)[first] * ratios[order])
        out = 1 - density[np.argsort(order)]
        return list(out) if xp is jnp else [max(0.0, float(s)) for s in out]

    return _spread(params, where, sparsities)
