"""How rare the classes are: a head of sigmoids that knows it before training.

Reference: J. Chen, D. Liu, T. Xu, S. Wu, Y. Cheng, E. Chen, "Is Heuristic Sampling Necessary in
Training Deep Object Detectors?", arXiv:1909.04868.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Num

from jaxkit import tree

__all__ = [
    "class_prior",
    "count_foreground",
    "guided_loss",
    "prior_bias",
    "sampling_free_loss",
]


def count_foreground(
    labels: Int[Array, "..."], *, axis_name: str | Sequence[str] | None = None
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Return how many labels are positive (> 0), and how many count (>= 0; -1 is to be ignored).

    Add the counts up over the batches of the training set.

    >>> [int(n) for n in count_foreground(jnp.array([0, 0, 3, 1, -1]))]
    [2, 4]
    """
    counts = (labels > 0).sum(), (labels >= 0).sum()
    return counts if axis_name is None else lax.psum(counts, axis_name)


def class_prior(
    positives: int | Num[Array, "*classes"], total: int | Num[Array, ""], classes: int = 1
) -> float | Float[Array, "*classes"]:
    """Return pi = N_f / (N C), the frequency of ones among the targets of C sigmoids per anchor.

    Args:
      positives: N_f, of all classes together; or one count per class, with ``classes=1``, for one
        prior per class.
      total: N, positives and negatives, without those that are ignored.
      classes: C.

    Raises:
      ValueError: one count per class with ``classes`` other than 1, or (eagerly) counts that give
        no frequency strictly between 0 and 1.

    >>> round(class_prior(137, 20_000, 5), 6)
    0.00137
    """
    if classes < 1:
        raise ValueError(f"classes={classes}: one or more are due")
    if np.ndim(positives) and classes != 1:
        raise ValueError(
            f"one count per class came, of shape {np.shape(positives)}, and classes={classes}, "
            "which would divide each by it again: leave it at 1"
        )
    if not tree.concrete(positives, total):
        return positives / (total * classes)
    pi = np.asarray(positives, float) / (float(total) * classes) if total else np.array(math.nan)
    if not ((pi > 0) & (pi < 1)).all():
        raise ValueError(
            f"{positives} positives of {total} with {classes} classes give the prior {pi}, and one "
            "strictly between 0 and 1 is due"
        )
    return float(pi) if pi.ndim == 0 else jnp.asarray(pi, float)


def prior_bias(prior: float | Float[Array, "*classes"]) -> jax.nn.initializers.Initializer:
    """Return the initializer of a sigmoid head's bias with which it predicts `prior` at first.

    ``b = -log((1 - pi) / pi)``. With a kernel of zeros the gradient of the cross entropy with
    respect to the bias is zero, when summed over the data that `prior` was counted on: no step is
    lost on learning how rare positives are. It is meant for sigmoids, not for a softmax, where a
    common shift of all logits does nothing.

    Args:
      prior: of `class_prior`; a vector (one per class) has to broadcast to the bias.

    Raises:
      ValueError: (eagerly) a prior outside (0, 1); a shape that it does not broadcast to.

    Reference: J. Chen et al., arXiv:1909.04868.

    >>> bias = prior_bias(0.01)(jax.random.key(0), (3,))
    >>> [round(p, 6) for p in jax.nn.sigmoid(bias).tolist()]
    [0.01, 0.01, 0.01]
    """
    if tree.concrete(prior):
        value = np.asarray(prior, float)
        if not ((value > 0) & (value < 1)).all():
            raise ValueError(f"a prior strictly between 0 and 1 is due, and {prior} came")

    def init(key, shape, dtype=None, out_sharding=None):
        del key
        pi = jnp.asarray(prior, float)
        dtype = pi.dtype if dtype is None else dtype
        try:
            bias = jnp.broadcast_to(jnp.log(pi) - jnp.log1p(-pi), shape).astype(dtype)
        except ValueError:
            raise ValueError(
                f"a prior of shape {pi.shape} does not broadcast to a bias of shape {tuple(shape)}"
            ) from None
        return bias if out_sharding is None else jax.sharding.reshard(bias, out_sharding)

    return init


def sampling_free_loss(
    logits: Float[Array, "..."], targets: Num[Array, "..."], images: int | Array
) -> Float[Array, ""]:
    """The binary cross entropy over all anchors and classes, over (positives + images).

    No sampling, no weights. `targets` are 0 or 1; leave ignored anchors out.

    Raises:
      ValueError: shapes that differ.

    >>> round(sampling_free_loss(jnp.zeros((2, 2)), jnp.eye(2), 2).item(), 4)
    0.6931
    """
    if logits.shape != targets.shape:
        raise ValueError(f"targets of shape {logits.shape} are due, and {targets.shape} came")
    logits = tree.float32(logits)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
    return losses.sum() / (targets.sum() + images)


def guided_loss(
    loss: Float[Array, ""], guide: Float[Array, ""], *, eps: float = 1e-12
) -> Float[Array, ""]:
    """Scale a loss to the value of another one: ``loss * stop_gradient(guide / loss)``.

    The value is that of `guide` (the regression loss), the gradient has the direction of `loss`'s
    and `guide` gets none. Where `guide` is 0 (no positives in the batch) there is no gradient.

    >>> value, grad = jax.value_and_grad(lambda x: guided_loss(x**2, jnp.array(2.0)))(3.0)
    >>> round(value.item(), 5), round(grad.item(), 5)  # 6 * 2 / 9
    (2.0, 1.33333)
    """
    return loss * lax.stop_gradient(guide / jnp.maximum(loss, eps))
