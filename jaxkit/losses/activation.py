"""Penalties on activations: the kurtosis of what layers put out, and channels that stand out."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import tree
from jaxkit.trace.taps import taps

__all__ = ["kurtosis", "kurtosis_penalty", "outlier_channels"]


def kurtosis(
    y: Float[Array, "..."], *, axis: int | tuple[int, ...] = -1, eps: float = 1e-6
) -> Float[Array, "..."]:
    """Return the kurtosis mean(((y - mean) / (sd + eps))^4): 3 for normal, 6 for Laplace entries.

    Population moments over `axis`, in float32 or wider. Large where a few entries stand far out.
    Scale and shift do not matter with eps = 0. Constant entries have 0, with zero gradient.

    Args:
      y: activations.
      axis: what the moments are over; default: the features of each token.
      eps: is added to the standard deviation.

    Reference: A. Nrusimha, M. Mishra, N. Wang, D. Alistarh, R. Panda, Y. Kim, "Mitigating the
    Impact of Outlier Channels for Language Model Quantization with Activation Regularization",
    arXiv:2404.03605. (The eps is our choice.)

    >>> kurtosis(jnp.array([[1.0, -1.0, 1.0, -1.0], [3.0, 3.0, 3.0, 3.0]]), eps=0).tolist()
    [1.0, 0.0]
    """
    y = tree.float32(y)
    centered = y - y.mean(axis, keepdims=True)
    variance = jnp.square(centered).mean(axis, keepdims=True)
    spread = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    # z in place of the fourth power of what may overflow
    z = centered / jnp.where(variance > 0, spread + eps, 1)
    return jnp.square(jnp.square(z)).mean(axis)


def kurtosis_penalty(
    apply_fn: Callable[..., PyTree], *, where: tree.Where = None, eps: float = 1e-6
) -> Callable[..., tuple[PyTree, Float[Array, ""]]]:
    """Return ``fn(params, *args) -> (apply_fn(params, *args), penalty)``.

    penalty = sum over layers of the mean `kurtosis` of the output of the layer's operation, each
    token (the last axis) for itself; every use of a leaf that is shared counts. Add about 1e-5 of
    it to the cross entropy, and sweep; against outlier channels, together with
    `reparam.quantized_inputs`.

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      where: the leaves whose outputs count; default: the weights.
      eps: as for `kurtosis`.

    Raises:
      ValueError: what `trace.taps` raises.

    Reference: as for `kurtosis`. (Whether the paper takes tokens or whole batches is not known to
    us; tokens are our choice.)

    >>> apply_fn = lambda params, x: x @ params["kernel"]
    >>> x = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    >>> out, penalty = kurtosis_penalty(apply_fn, eps=0)({"kernel": jnp.eye(4)}, x)
    >>> penalty.item()
    1.0
    """
    tapped = taps(apply_fn, where)

    def with_penalty(params: PyTree, *args: Any) -> tuple[PyTree, Float[Array, ""]]:
        out, found = tapped(params, *args)
        uses = [use for tap in found.values() for use in (tap, *tap.later)]
        each = [kurtosis(use.output, eps=eps).mean() for use in uses]
        return out, sum(each, jnp.zeros(()))

    return with_penalty


def outlier_channels(
    x: Float[Array, "... channels"], *, factor: float | Array = 6.0
) -> Bool[Array, " channels"]:
    """Mark the channels whose mean magnitude is more than `factor` times the average channel's.

    Channel c is an outlier if mean |x_c| > factor mean_c mean |x_c|. Count them in every layer::

        _, found = trace.taps(apply_fn)(params, batch)
        counts = {path: outlier_channels(tap.input).sum() for path, tap in found.items()}

    Args:
      x: activations, channels last.
      factor: 6 by default; with n channels no more than n / factor can be outliers.

    Reference: as for `kurtosis`.

    >>> outlier_channels(jnp.array([[1.0] * 9 + [-100.0]])).sum().item()
    1
    """
    mean = jnp.abs(tree.float32(x)).mean(tuple(range(x.ndim - 1)))
    return mean > factor * mean.mean()
