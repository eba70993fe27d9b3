"""Interval bounds: weights that keep them from exploding, the bounds, and the warm-up regularizer.

For certified training with interval bound propagation (IBP). A pair of arrays (lower, upper) is
carried from the input ``(x - eps, x + eps)`` through `affine_bounds` and monotone activations::

    lower, upper = init.affine_bounds(x - eps, x + eps, kernel, bias)
    lower, upper = jax.nn.relu(lower), jax.nn.relu(upper)

eps is in the units of x: inputs that are normalized take eps over their standard deviation. The
other half of the recipe is JAX's and optax's: batch normalization after each affine layer, eps
ramped up from 0, ``optax.clip_by_global_norm(10)`` and ``optax.piecewise_constant_schedule``.

Reference: Z. Shi, Y. Wang, H. Zhang, J. Yi, C.-J. Hsieh, "Fast Certified Robust Training with Short
Warmup", arXiv:2103.17268.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkit import tree

__all__ = ["Bounds", "affine_bounds", "ibp", "ibp_regularizer"]

Bounds = tuple[Float[Array, "..."], Float[Array, "..."]]


def ibp(
    scale: float = 1.0,
    *,
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
) -> jax.nn.initializers.Initializer:
    """Return N(0, 2π scale²/fan_in²): the half-width of intervals is kept through affine and ReLU.

    Half of an interval's image under ReLU is active on average, and the half-width gain
    ½ fan_in E|W| is 1 for std √(2π)/fan_in. It is meant for all weights but the classifier's::

        init = init.rules((["**/Dense_0/kernel", "**/Dense_1/kernel"], init.ibp()))

    Args:
      scale: 1/2 for a kernel whose (activated) input is a sum of two branches.
      in_axis, out_axis, batch_axis: as in ``variance_scaling``; kernels that are stacked, as for a
        scan over layers, take ``batch_axis=0``.

    Raises:
      ValueError: scale <= 0, or a shape of fewer than two dimensions.

    Reference: Z. Shi et al., arXiv:2103.17268, section 3.1.

    >>> w = ibp()(jax.random.key(0), (100, 200))
    >>> round(0.5 * float(abs(w).sum(0).mean()), 1)
    1.0
    """
    if not scale > 0:
        raise ValueError(f"scale is positive, and {scale} came")
    others = [int(axis) for axis in (*np.ravel(out_axis), *np.ravel(batch_axis))]

    def init(key: Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Array:
        if len(shape) < 2:
            raise ValueError(f"a kernel of two or more dimensions is due, and {tuple(shape)} came")
        fan_in = math.prod(shape) // max(1, math.prod(shape[axis] for axis in others))
        variance = 2 * math.pi * scale**2 / max(1, fan_in)
        draw = jax.nn.initializers.variance_scaling(
            variance, "fan_in", "normal", in_axis, out_axis, batch_axis
        )
        return draw(key, shape, dtype, out_sharding=out_sharding)

    return init


def affine_bounds(
    lower: Float[Array, "*batch n"],
    upper: Float[Array, "*batch n"],
    kernel: Float[Array, "n m"],
    bias: Float[Array, " m"] | None = None,
) -> Bounds:
    """Return the bounds of ``x @ kernel + bias`` over lower <= x <= upper: c W + b ∓ r |W|.

    c and r are the centre and the half-width of the interval. Sound for any convolution or other
    linear map alike, with its kernel replaced by |kernel| for the half-width.

    Raises:
      ValueError: shapes that do not fit, or (eagerly) lower > upper somewhere.

    >>> low, high = affine_bounds(-jnp.ones(2), jnp.ones(2), jnp.array([[1.0], [-2.0]]))
    >>> float(low[0]), float(high[0])
    (-3.0, 3.0)
    """
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    if lower.shape != upper.shape or lower.shape[-1:] != kernel.shape[:1] or kernel.ndim != 2:
        raise ValueError(
            f"bounds (..., n) and a kernel (n, m) are due, and {lower.shape}, {upper.shape} and "
            f"{kernel.shape} came"
        )
    crossed = (lower > upper).any()
    if tree.concrete(crossed) and crossed:
        raise ValueError("a lower bound exceeds its upper bound")
    centre, half = (upper + lower) / 2 @ kernel, (upper - lower) / 2 @ jnp.abs(kernel)
    centre = centre if bias is None else centre + bias
    return centre - half, centre + half


def _balance(active: Array, inactive: Array) -> Array:
    """Return min(a, 1/a) of a = active/inactive >= 0, 0 for one without the other."""
    empty = inactive == 0  # the double where: no gradient passes through a division by zero
    a = jnp.where(empty, 0.0, active / jnp.where(empty, 1.0, inactive))
    return jnp.minimum(a, 1 / jnp.maximum(a, 1e-12))


def ibp_regularizer(
    inputs: Bounds,
    preactivations: Sequence[Bounds],
    *,
    eps_ratio: float | Array,
    weight: float = 0.5,
    tolerance: float = 0.5,
) -> Float[Array, ""]:
    """Return the warm-up loss that tightens bounds and balances ReLUs; add it to the robust loss.

    weight (1 - eps_ratio) Σ_i [relu(τ - t₀/t_i) + relu(τ - r_mean) + relu(τ - r_var)] / (τ layers)

    with t the mean half-widths (t₀ the input's), r_mean = min(a, 1/a) for the ratio a of the summed
    centres of active (lower > 0) to minus those of inactive (upper < 0) units, and r_var the same
    of their summed squared deviations. A layer without inactive units has no balance terms; one
    without active units has r = 0, and no gradient from them. A float32 scalar; 0 when
    eps_ratio = 1.

    Args:
      inputs: bounds (lower, upper) of the network's input.
      preactivations: bounds of the input of each ReLU, the batch first.
      eps_ratio: the current eps over the final one; a number or traced.

    Raises:
      ValueError: no layer, tolerance <= 0, or a pair of bounds of different shapes.

    Reference: Z. Shi et al., arXiv:2103.17268, section 3.3, and its code (sums over active units,
    means of half-widths).

    >>> x, z = (jnp.zeros((2, 3)), jnp.ones((2, 3))), (jnp.ones((2, 4)), jnp.full((2, 4), 9.0))
    >>> float(ibp_regularizer(x, [z], eps_ratio=0.0))  # 0.5 * relu(0.5 - 1/8) / 0.5
    0.375
    """
    if not preactivations:
        raise ValueError("the bounds of at least one ReLU's input are due")
    if not tolerance > 0:
        raise ValueError(f"tolerance is positive, and {tolerance} came")
    for lower, upper in [inputs, *preactivations]:
        if jnp.shape(lower) != jnp.shape(upper):
            raise ValueError(f"bounds of shapes {jnp.shape(lower)} and {jnp.shape(upper)} came")
    wide = lambda pair: [jnp.asarray(x).astype(jnp.float32) for x in pair]
    half = lambda lower, upper: jnp.maximum(((upper - lower) / 2).mean(), 1e-12)
    width = half(*wide(inputs))
    total = jnp.zeros((), jnp.float32)
    for pair in preactivations:
        lower, upper = wide(pair)
        total += jax.nn.relu(tolerance - width / half(lower, upper))
        centre, on, off = (upper + lower) / 2, lower > 0, upper < 0
        spread = jnp.square(centre - centre.mean())
        mean = _balance(jnp.where(on, centre, 0).sum(), -jnp.where(off, centre, 0).sum())
        spreads = jnp.where(on, spread, 0).sum(), jnp.where(off, spread, 0).sum()
        balance = jax.nn.relu(tolerance - mean) + jax.nn.relu(tolerance - _balance(*spreads))
        total += jnp.where(off.any() & (spreads[0] + spreads[1] > 0), balance, 0)
    return weight * (1 - eps_ratio) * total / (tolerance * len(preactivations))
