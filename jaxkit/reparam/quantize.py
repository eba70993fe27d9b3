"""Fake quantization of activations, with a clip that is learned."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.reparam.supermask import straight_through
from jaxkit.trace.taps import replay

__all__ = ["fake_quantize", "quantized_inputs"]


def _check_clips(low: Any, high: Any) -> None:
    if violates(lambda low, high: low < high, low, high):
        raise ValueError(f"the upper clip {high} is due above the lower one, {low}")


def fake_quantize(
    x: Float[Array, "*shape"],
    low: float | Float[Array, ""],
    high: float | Float[Array, ""],
    bits: int = 4,
) -> Float[Array, "*shape"]:
    """Round to 2^bits levels between a lower and an upper clip, both of which can be trained.

    With c(x) the clipped x and s = (2^bits - 1) / (high - low)::

        y = (round(c(x) s - low s) + low s) / s            (half to even)

    Zero is not a level in general. In the backward pass the rounding is the identity; with
    u = (x - low) s and e = (u - round(u)) / (2^bits - 1): between the clips dy/dx = 1,
    dy/dhigh = -e and dy/dlow = e; at and above the upper one dy/dhigh = 1, at and below the lower
    one dy/dlow = 1, and nothing else.

    Args:
      x: floats; the result has their dtype, and is computed in float32 or wider.
      low, high: the clips.
      bits: how many, 1 or more.

    Raises:
      ValueError: high not above low (if they are known), or no bits.

    Reference: A. Nrusimha, M. Mishra, N. Wang, D. Alistarh, R. Panda, Y. Kim, "Mitigating the
    Impact of Outlier Channels for Language Model Quantization with Activation Regularization",
    arXiv:2404.03605, after J. Choi et al., "PACT: Parameterized Clipping Activation for Quantized
    Neural Networks", arXiv:1805.06085.

    >>> fake_quantize(jnp.array([-3.0, -0.4, 0.2, 9.0]), -1.0, 2.0, bits=2).tolist()
    [-1.0, 0.0, 0.0, 2.0]
    """
    if bits < 1:
        raise ValueError(f"bits={bits}, and 1 or more were due")
    _check_clips(low, high)
    dtype = x.dtype
    x = tree.float32(x)
    low, high = (jnp.asarray(clip, x.dtype) for clip in (low, high))
    scale = (2**bits - 1) / (high - low)
    # (jnp.clip would share the gradient between x and the clip where they are equal)
    clipped = jnp.where(x >= high, high, jnp.where(x <= low, low, x))
    level = clipped * scale - low * scale
    y = (straight_through(level, jnp.round(level)) + low * scale) / scale
    return y.astype(dtype)


def quantized_inputs(
    apply_fn: Callable[..., PyTree],
    clips: Mapping[str, tuple[Any, Any]],
    *,
    bits: int = 4,
) -> Callable[..., PyTree]:
    """Return `apply_fn` with the inputs of the operations of some leaves fake-quantized.

    ``y = op(x, w)`` becomes ``op(fake_quantize(x, low, high, bits), w)``. The clips are one number
    each for a layer, not for a channel, so that an integer matmul can follow; differentiate with
    respect to them, by building this inside the loss. They start at ±4, by our choice.

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      clips: ``{path: (low, high)}``.
      bits: how many.

    Raises:
      ValueError: as for `fake_quantize` and `trace.replay`.

    Reference: as for `fake_quantize`.

    >>> apply_fn = lambda params, x: x @ params["kernel"]
    >>> fn = quantized_inputs(apply_fn, {"kernel": (-1.0, 2.0)}, bits=2)
    >>> fn({"kernel": jnp.ones((2, 1))}, jnp.array([[0.2, 9.0]])).tolist()
    [[2.0]]
    """

    def quantized(op, x, w, clip):
        low, high = clip
        return op.run(fake_quantize(x, low, high, bits), w)

    for low, high in clips.values():
        _check_clips(low, high)
    arrays = {
        path: tuple(jnp.asarray(c, jnp.float32) for c in clip) for path, clip in clips.items()
    }
    return replay(apply_fn, {path: (quantized, clip) for path, clip in arrays.items()})
