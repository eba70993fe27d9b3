"""Penalties on activations: the kurtosis of what layers put out, and channels that stand out."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import tree
from jaxkit.trace.taps import Tap, taps

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
    token for itself: over all axes of the output that are the leaf's own, so over all heads
    together. Slices of a leaf in a scan are layers, and every further use of a shared leaf counts;
    but the iterations of a scan that share a leaf (time) are averaged, as tokens are. Add about
    1e-5 of it to the cross entropy, and sweep; against outlier channels, together with
    `reparam.quantized_inputs`.

    What comes out of a kernel's operation has no bias yet. The output of a bias is the sum: choose
    the biases in place of their kernels, ``where="**/bias"``, to have it penalized.

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
        total = jnp.zeros(())
        for path, leaf in tree.chosen(params, where).items():
            for use in (found[path], *found[path].later) if path in found else ():
                layers = math.prod(jnp.shape(leaf)[: jnp.ndim(leaf) - len(use.y_axes)])
                total += layers * kurtosis(use.output, axis=_own(use), eps=eps).mean()
        return out, total

    return with_penalty


def _own(tap: Tap) -> tuple[int, ...]:
    """Return the axes of the output that the leaf produces, or else those that it shares."""
    pairs = [(x, y) for x, y in zip(tap.x_axes, tap.y_axes, strict=True) if y is not None]
    produced = tuple(y for x, y in pairs if x is None)
    return produced or tuple(y for _, y in pairs) or (-1,)


def outlier_channels(
    x: Float[Array, "..."], *, axis: int | tuple[int, ...] = -1, factor: float | Array = 6.0
) -> Bool[Array, "..."]:
    """Mark the channels whose mean magnitude is more than `factor` times the average channel's.

    Channel c is an outlier if mean |x_c| > factor mean_c mean |x_c|. Count them in what goes into
    every layer::

        _, found = trace.taps(apply_fn)(params, batch)
        for path, tap in found.items():
            axis = tuple(a for a in tap.x_axes if a is not None)  # (-2, -1) after attention heads
            print(path, outlier_channels(tap.input, axis=axis).sum())

    Args:
      x: activations. Layers that a scan has stacked are each for themselves (`vmap`).
      axis: what the channels are; default: the last axis. The mean is over all others.
      factor: 6 by default; with n channels no more than n / factor can be outliers.

    Returns:
      True for outliers, in the shape of the channels.

    Reference: as for `kurtosis`.

    >>> outlier_channels(jnp.array([[1.0] * 9 + [-100.0]])).sum().item()
    1
    """
    channels = {a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    mean = jnp.abs(tree.float32(x)).mean(tuple({*range(x.ndim)} - channels))
    return mean > factor * mean.mean()
