"""Dropout before a linear head, in closed form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["dropout_head"]


def dropout_head(
    x: Float[Array, "n features"], y: Float[Array, "n *outputs"], *, rate: float | Array = 0.9
) -> Float[Array, "features *outputs"]:
    """Return the linear head that training with dropout on its inputs ends at, for squared loss.

    E |mask(X) W - Y|^2 / n = |X W - Y|^2 / n + p / (1 - p) sum_j mean(x_j^2) |W_j|^2, over inverted
    dropout masks of rate p: a ridge in the units of each feature, whose minimum is

        W = (C + p / (1 - p) diag(C))^-1 X^T Y / n,   C = X^T X / n.

    Very large rates (0.9, 0.95) make it use all features that say the same, where a small one takes
    the strongest: what helps when those are missing in other data. As p goes to 1, each feature is
    used as if it were alone: W_j is proportional to x_j y / x_j x_j.

    To fine-tune a whole pretrained network so, put ``flax.linen.Dropout(0.9)`` before its head, and
    predict without (``deterministic=True``); a network trained from scratch does not learn with it.

    Args:
      x: features, with mean 0 or with a column of ones (which dropout hits too).
      y: targets, with mean 0 if there is no such column.
      rate: p, the share that is dropped, in [0, 1).

    Raises:
      ValueError: a rate outside [0, 1).

    Reference: J. Zhang, L. Bottou, "Fine-tuning with Very Large Dropout", arXiv:2403.00946; the
    identity: S. Wager, S. Wang, P. Liang, "Dropout Training as Adaptive Regularization",
    arXiv:1307.1493.

    >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # the same feature twice
    >>> w = dropout_head(x, jnp.array([1.0, -1.0]), rate=0.5)
    >>> [round(float(v), 4) for v in w]  # 1 / (2 + 1) each
    [0.3333, 0.3333]
    """
    if violates(lambda p: (p >= 0) & (p < 1), rate):
        raise ValueError(f"rate={rate}, and the share to drop, in [0, 1), was due")
    x, y = tree.float32(x), tree.float32(y)
    second = x.T @ x / len(x)
    diagonal = jnp.diag(second)
    # a feature that is 0 everywhere gets the weight 0
    ridge = jnp.where(diagonal > 0, rate / (1 - rate) * diagonal, 1)
    target = x.T @ y.reshape(len(y), -1) / len(x)
    solved = jax.scipy.linalg.solve(second + jnp.diag(ridge), target, assume_a="pos")
    return solved.reshape(x.shape[1], *y.shape[1:])
