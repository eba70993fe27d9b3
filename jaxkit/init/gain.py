"""Gains: from the moments of an activation to the scale of the weights that follow it.

A gain g is a standard deviation times √fan_in; JAX's ``variance_scaling`` takes g². The named rules
return initializers, or numbers to build them with; everything is computed while tracing.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.init import gauss

__all__ = ["balanced_sigma", "gain", "input_gain", "maxout", "maxout_range", "vi3nr"]

Distribution = Literal["truncated_normal", "normal", "uniform"]


def gain(
    phi: gauss.Activation,
    sigma: float = 1.0,
    *,
    rule: Literal["forward", "backward", "centered"] = "forward",
) -> float:
    """Return the gain that keeps preactivations N(0, σ²) through x -> φ(x) @ W.

    * forward: σ / √(E φ(σZ)²) keeps the variance of preactivations (He for ReLU, VI3NR);
    * backward: 1 / √(E φ'(σZ)²) keeps that of gradients (1 at the edge of chaos);
    * centered: σ / √(Var φ(σZ)) keeps the variance where the mean of φ is taken away from the
      weights' side (scaled weight standardization).

    Raises:
      ValueError: σ <= 0, another rule, or an activation that is numerically zero (constant, flat)
        at σ, or whose slope is infinite.

    >>> round(gain(jax.nn.relu) ** 2, 9), round(gain(jnp.tanh), 4)
    (2.0, 1.5925)
    """
    q = gauss.check_variance(sigma, "sigma") ** 2
    m = gauss.moments(phi, q, order=1 if rule == "backward" else 0)
    name = getattr(phi, "__name__", "the activation")
    if rule == "forward":
        squared, what = m.m2 / q, "numerically zero"
    elif rule == "backward":
        squared, what = m.d2, "without a finite slope, or flat,"
    elif rule == "centered":
        squared, what = (m.m2 - m.m1**2) / q, "numerically constant"
        squared = squared if squared * q > 1e-13 * m.m2 else 0.0
    else:
        raise ValueError(f"the rules are forward, backward and centered; {rule!r} came")
    if not 1e-200 < squared < math.inf:
        raise ValueError(f"{name} is {what} at sigma = {sigma:g}: it has no {rule} gain")
    return 1 / math.sqrt(squared)


def input_gain(x: Float[Array, "..."], sigma: float = 1.0) -> Float[Array, ""]:
    """Return the gain of the first layer: σ / √(mean(x)² + std(x)²) over all entries of x.

    float32, traceable: σ over the root mean square of the data.

    Raises:
      TypeError: integers (coordinates of pixels are to be scaled first).
      ValueError: no entry, or (where known) data that is all zero or a σ that is not positive.

    Reference: C. Hewa Koneputugodage, Y. Ben-Shabat, S. Ramasinghe, S. Gould, "VI3NR: Variance
    Informed Initialization for Implicit Neural Representations", arXiv:2504.19270.

    >>> float(input_gain(jnp.array([[3.0, -3.0]]), 1.5))
    0.5
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"float inputs are due, and {x.dtype} came: scale coordinates first")
    if x.size == 0:
        raise ValueError("the gain of no data is not defined")
    if violates(lambda s: s > 0, sigma):
        raise ValueError(f"sigma must be positive, and {sigma} came")
    second = jnp.square(x.astype(jnp.float32)).mean()
    if tree.concrete(second) and second == 0:
        raise ValueError("the inputs are all zero: no gain gives them a variance")
    return sigma / jnp.sqrt(second)


def vi3nr(
    phi: gauss.Activation, sigma: float = 1.0, *, distribution: Distribution = "uniform", **axes
) -> jax.nn.initializers.Initializer:
    """Return the initializer of a layer that follows φ: preactivations stay N(0, σ²) at any depth.

    Var W = (σ² / E φ(σZ)²) / fan_in, the forward `gain`. The first layer takes
    ``variance_scaling(input_gain(x, sigma) ** 2, "fan_in", distribution)``; biases are 0. For
    coordinate networks choose ``sigma=balanced_sigma(phi)``, which keeps gradients as well.

    Args:
      phi: the activation before the layer.
      sigma: standard deviation of its preactivations, a positive number.
      distribution: of the entries; "normal", "uniform" or "truncated_normal".
      **axes: ``in_axis``, ``out_axis``, ``batch_axis``, ``dtype`` of ``variance_scaling``.

    Raises:
      ValueError: as `gain`.

    Reference: C. Hewa Koneputugodage et al., arXiv:2504.19270; quadrature stands for the Monte
    Carlo of its code.

    >>> w = vi3nr(jnp.sin, 2.0)(jax.random.key(0), (400, 100))
    >>> round(float(w.std() * 20), 1), round(gain(jnp.sin, 2.0), 1)
    (2.8, 2.8)
    """
    scale = gain(phi, sigma) ** 2
    return jax.nn.initializers.variance_scaling(scale, "fan_in", distribution, **axes)


def balanced_sigma(phi: gauss.Activation) -> float:
    """Return the σ at which one gain keeps activations and gradients: σ² E φ'(σZ)² = E φ(σZ)².

    Layers of equal width are meant. For exp(-x²/2s²) it is s √(1 + √2). Homogeneous activations
    have it at every σ, and 1 is returned. Of several, the one closest to 1 (on a log scale, between
    1e-4 and 1e4).

    Raises:
      ValueError: no such σ (tanh: χ < 1 at any σ > 0).

    >>> round(balanced_sigma(lambda x: jnp.exp(-(x**2) / 2)), 4)
    1.5538
    """

    def excess(log_sigma):
        m = gauss.moments(phi, math.exp(2 * log_sigma), order=1)
        if not (m.m2 > 0 and 0 < m.d2 < math.inf):
            return math.nan
        return math.log(m.d2 / m.m2) + 2 * log_sigma

    if abs(excess(0.0)) < 1e-11:
        return 1.0
    logs = np.linspace(math.log(1e-4), math.log(1e4), 49)
    values = [excess(t) for t in logs]
    roots = [
        gauss.root(excess, logs[i], logs[i + 1])
        for i in range(48)
        if values[i] * values[i + 1] < 0 and max(abs(values[i]), abs(values[i + 1])) > 1e-9
    ]
    if not roots:
        raise ValueError(
            f"{getattr(phi, '__name__', 'the activation')} has no sigma in [1e-4, 1e4] at which "
            "sigma**2 E phi'**2 = E phi**2"
        )
    return math.exp(min(roots, key=abs))


def maxout(
    rank: int = 5, *, pool: int = 1, distribution: Distribution = "normal", **axes
) -> jax.nn.initializers.Initializer:
    """Return the initializer of the affine maps of maxout units: Var W = c/fan_in, c = 1/M.

    M = E (max of `rank` standard normals)², so that the second moment of units is kept: c = 1, 1,
    0.78391, 0.64461, 0.55555 for ranks 1 to 5. The maps of a unit are adjacent on the output axis,
    ``units = z.reshape(*z.shape[:-1], -1, rank).max(-1)``, so that fan_in is the number of units
    (times the taps of a convolution) before. Biases are 0, a linear output layer takes c = 1.

    Args:
      rank: how many affine maps share a unit.
      pool: how many units a max-pooling that follows takes the maximum of (4 for 2x2), on the
        convolution whose output is pooled: it is maxout of rank ``rank * pool``.
      distribution, **axes: of ``variance_scaling``.

    Raises:
      ValueError: rank or pool < 1, or a shape whose output axis (the last of ``out_axis``) `rank`
        does not divide.

    Reference: H. Tseran, G. Montúfar, "Expected Gradients of Maxout Networks and Consequences to
    Parameter Initialization", arXiv:2301.06956. (He's scale 2 makes units of rank K grow by 2 M a
    layer.)

    >>> w = maxout(5)(jax.random.key(0), (500, 40 * 5))
    >>> round(float(w.var() * 500), 2)
    0.56
    """
    for name, value in (("rank", rank), ("pool", pool)):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} is an int >= 1, and {value!r} came")
    c = 1 / gauss.pool_moment(rank * pool)
    draw = jax.nn.initializers.variance_scaling(c, "fan_in", distribution, **axes)
    axis = int(np.ravel(axes.get("out_axis", -1))[-1])

    def init(key: Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Array:
        if shape[axis] % rank:
            raise ValueError(
                f"units of rank {rank} take {rank} features each, adjacent on the axis {axis}, and "
                f"the shape {tuple(shape)} came"
            )
        return draw(key, shape, dtype, out_sharding=out_sharding)

    return init


def maxout_range(rank: int) -> tuple[float, float]:
    """Return the least and the largest c that bounds on the gradient of maxout networks admit.

    1 / E max(χ²₁, ..., χ²₁) <= c <= 1 / E min(χ²₁, ..., χ²₁), of `rank` variables.

    Raises:
      ValueError: rank < 1.

    Reference: H. Tseran, G. Montúfar, arXiv:2301.06956.

    >>> [round(c, 5) for c in maxout_range(5)]
    [0.36052, 12.03698]
    """
    return (
        1 / gauss.pool_moment(rank, extreme="max_abs"),
        1 / gauss.pool_moment(rank, extreme="min_abs"),
    )
