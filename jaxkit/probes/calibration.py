"""Calibration: whether a model is right as often as it says."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkit import tree

__all__ = ["ece"]


def ece(
    probabilities: Float[Array, "n classes"], labels: Int[Array, " n"], *, bins: int = 15
) -> Float[Array, ""]:
    """Return the expected calibration error, in [0, 1]: the mean gap of confidence and accuracy.

    ECE = sum_b n_b / n |accuracy_b - confidence_b|, over bins of equal width ((b-1)/bins, b/bins]
    of the confidence, the largest probability of an example. Empty bins count 0.

    Args:
      probabilities: of the classes, not logits; each row sums to 1.
      labels: the true classes.
      bins: how many.

    Raises:
      ValueError: rows that are no probabilities (known values; traced ones are not looked at), or
        shapes that do not fit.

    Reference: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural
    Networks", arXiv:1706.04599.

    >>> sure = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> float(ece(sure, jnp.array([0, 1]))), float(ece(sure, jnp.array([0, 0])))
    (0.5, 0.0)
    """
    if jnp.ndim(probabilities) != 2 or jnp.shape(labels) != jnp.shape(probabilities)[:1]:
        shapes = f"{jnp.shape(probabilities)} and {jnp.shape(labels)}"
        raise ValueError(f"probabilities (n, classes) and labels (n,) are due, and {shapes} came")
    if tree.concrete(probabilities):
        p = np.asarray(probabilities, np.float64)
        if p.size and (p.min() < -1e-3 or np.abs(p.sum(1) - 1).max() > 1e-2):
            raise ValueError("rows of probabilities are due, which sum to 1; softmax the logits")
    confidence = tree.float32(jnp.max(probabilities, axis=1))
    right = jnp.argmax(probabilities, axis=1) == labels
    bin_ = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = jax.ops.segment_sum(right - confidence, bin_, bins)  # n_b (accuracy - confidence)
    return jnp.abs(gap).sum() / max(len(labels), 1)
