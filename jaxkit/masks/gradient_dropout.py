"""Gradient dropout: the gradient of one loss passes where that of another agrees."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["gradient_dropout"]


def gradient_dropout(
    key: PRNGKeyArray, grads: PyTree, others: PyTree, *, level: float | Array = 1.0
) -> PyTree:
    """Drop entries of a gradient at random, where another loss wants the opposite.

    With a and b the entries of the two gradients, a passes with probability
    P = (1 + sign(a) (a + b) / (|a| + |b| + 1e-8)) / 2: 1 where the signs agree, |a| / (|a| + |b|)
    where they do not. Out comes a (1 - level + level [u < P]); of b nothing is ever applied.

    Between ``jax.grad`` and the optimizer, with a new key each step; both gradients are of the same
    batch. The gradients themselves, or any trees of floats, may be of scores or of weights.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path alone.
      grads: the gradient a that is applied.
      others: the gradient b that gates it, a tree like `grads`.
      level: how much of a is dropped, in [0, 1].

    Returns:
      A tree like `grads`. E[out] = a (1 - level + level P).

    Raises:
      ValueError: a level outside [0, 1], or trees that differ.
      TypeError: a legacy uint32 key.

    Reference: K. Zheng, W. Wu, R. Feng, K. Zhu, J. Liu, D. Zhao, Z.-J. Zha, W. Chen, Y. Shen,
    "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    arXiv:2307.15049.

    >>> a, b = {"s": jnp.array([1.0, -2.0])}, {"s": jnp.array([3.0, -1.0])}
    >>> gradient_dropout(jax.random.key(0), a, b)["s"].tolist()
    [1.0, -2.0]
    """
    if violates(lambda x: (x >= 0) & (x <= 1), level):
        raise ValueError(f"level is {level}, and a share in [0, 1] was due")
    tree.check_like(grads, others, "other gradient")

    def drop(a: Any, b: Any, k: Any) -> Any:
        if not tree.is_inexact(a):
            return a
        wide, b = tree.float32(a), tree.float32(b)
        agreement = jnp.sign(wide) * (wide + b) / (jnp.abs(wide) + jnp.abs(b) + 1e-8)
        passes = jax.random.uniform(k, a.shape) < (1 + agreement) / 2
        return (wide * (1 - level + level * passes)).astype(a.dtype)

    keys = tree.keys(key, grads, "jaxkit.masks.gradient_dropout")
    return jax.tree.map(drop, grads, others, keys)
