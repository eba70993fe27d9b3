"""Deep linear networks: the start from which learning has an exact solution, and the solution.

Whitened inputs (E x xᵀ = I), loss ½ E ‖y - x W_1 ... W_D‖², gradient flow with time constant τ
(gradient descent of rate 1/τ a step). From a balanced, aligned start the singular modes of the
correlation E xᵀ y = V S Uᵀ decouple, and each grows on its own from u₀ to its s:

    τ du/dt = D u^(2 - 2/D) (s - u).

Reference: A. M. Saxe, J. L. McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of
learning in deep linear neural networks", arXiv:1312.6120.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jaxtyping import Array, Float, PRNGKeyArray

from jaxkit import tree

__all__ = ["Modes", "aligned", "learning_time", "linear_modes", "mode_strength"]


class Modes(NamedTuple):
    """Singular value decomposition of the input-output correlation: E xᵀ y = V diag(s) Uᵀ."""

    v: Float[Array, "n r"]
    s: Float[Array, " r"]
    u: Float[Array, "m r"]


def linear_modes(
    x: Float[Array, "examples n"], y: Float[Array, "examples m"], *, tolerance: float = 1e-3
) -> Modes:
    """Return the modes that a linear network learns: the singular vectors and values of xᵀ y / N.

    Args:
      x: whitened inputs, xᵀ x / N = I: other eigenvalues enter the rates, and the exact solution
        does not hold.
      tolerance: how far an entry of xᵀ x / N may be off.

    Raises:
      ValueError: different numbers of examples, or (eagerly) inputs that are not whitened.

    >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> linear_modes(x, x @ jnp.diag(jnp.array([3.0, 2.0]))).s.tolist()
    [3.0, 2.0]
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x (examples, n) and y (examples, m) are due: {x.shape}, {y.shape} came")
    with jax.default_matmul_precision("highest"):
        second = x.T @ x / x.shape[0]
        off = jnp.abs(second - jnp.eye(x.shape[1])).max()
        if tree.concrete(off) and not off <= tolerance:
            raise ValueError(
                f"the inputs are not whitened: an entry of x.T @ x / N is off by {float(off):.3g}"
            )
        v, s, ut = jnp.linalg.svd(x.T @ y / x.shape[0], full_matrices=False)
    return Modes(v, s, ut.T)


def _check_depth(depth: float) -> None:
    if not (depth == math.inf or (depth == int(depth) and depth >= 2)):
        raise ValueError(f"depth counts two or more weight layers (or is inf), and {depth} came")


def _rate(y: Array, s: Array, depth: float) -> Array:
    """Return τ dy/dt of the log odds y of u/s: D s (u)^(1 - 2/D), or s u in the limit."""
    u = s * jax.nn.sigmoid(y)
    return s * u if depth == math.inf else depth * s * u ** (1 - 2 / depth)


def mode_strength(
    t: Float[Array, " times"],
    s: float | Array,
    u0: float | Array,
    *,
    depth: float = 2,
    tau: float | Array = 1.0,
) -> Float[Array, " times"]:
    """Return the strength u(t) of a mode s from u(0) = u0 < s.

    Two layers: u = s / (1 + (s/u₀ - 1) exp(-2 s t/τ)). More: the log odds of u/s are integrated
    numerically (float32: six digits). ``depth=inf`` is the limit with the rate divided by the
    depth: τ du/dt = u² (s - u).

    Args:
      t: increasing times >= 0, in units of τ's (steps of gradient descent for τ = 1/rate).
      s, u0, tau: numbers or traced scalars, 0 < u0 < s.
      depth: number of weight layers, static; a whole number >= 2 or inf.

    Raises:
      ValueError: another depth, or (for numbers) u0 outside (0, s).

    Reference: A. M. Saxe et al., arXiv:1312.6120, equations 5 to 8 and 14.

    >>> u = mode_strength(jnp.array([0.0, 2.0, 20.0]), 2.0, 0.1)
    >>> [round(v, 3) for v in u.tolist()]
    [0.1, 1.987, 2.0]
    """
    _check_depth(depth)
    if all(isinstance(value, int | float) for value in (s, u0)) and not 0 < u0 < s:
        raise ValueError(f"0 < u0 < s is due, and u0 = {u0}, s = {s} came")
    t, s, u0 = jnp.asarray(t, float), jnp.asarray(s, float), jnp.asarray(u0, float)
    if t.ndim != 1:
        raise ValueError(f"a vector of times is due, and one of shape {t.shape} came")
    y0 = jnp.log(u0 / (s - u0))
    if depth == 2:
        return s * jax.nn.sigmoid(y0 + 2 * s * t / tau)
    times = jnp.concatenate([jnp.zeros(1, t.dtype), t]) / tau
    y = odeint(lambda y, _: _rate(y, s, depth), y0, times, rtol=1e-6, atol=1e-6)
    return s * jax.nn.sigmoid(y[1:])


def learning_time(
    u0: float, u: float, s: float, *, depth: float = 2, tau: float = 1.0, panels: int = 16
) -> float:
    """Return the time in which a mode s grows from u0 to u: the inverse of `mode_strength`.

    τ/(2s) ln[u (s - u₀) / (u₀ (s - u))] for two layers; generally the integral over the log odds of
    τ / (D s u^(1 - 2/D)), smooth, by Gauss-Legendre. On the host, in float64.

    Raises:
      ValueError: unless 0 < u0 <= u < s, or another depth.

    Reference: A. M. Saxe et al., arXiv:1312.6120, equation 7.

    >>> round(learning_time(0.1, 1.9, 2.0), 6)
    1.472219
    """
    _check_depth(depth)
    if not 0 < u0 <= u < s:
        raise ValueError(f"0 < u0 <= u < s is due, and u0 = {u0}, u = {u}, s = {s} came")
    start, end = math.log(u0 / (s - u0)), math.log(u / (s - u))
    if depth == 2:
        return tau * (end - start) / (2 * s)
    x, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(start, end, panels + 1)
    half = np.diff(edges)[:, None] / 2
    y = edges[:-1, None] + half * (1 + x)
    strength = s / (1 + np.exp(-y))
    rate = s * strength if depth == math.inf else depth * s * strength ** (1 - 2 / depth)
    return float(tau * (half * w / rate).sum())


def aligned(
    key: PRNGKeyArray,
    correlation: Float[Array, "n m"],
    depth: int,
    *,
    u0: float | Array,
    width: int | None = None,
) -> tuple[Float[Array, "fan_in fan_out"], ...]:
    """Return kernels W_1, ..., W_D of a deep linear network from which its modes decouple.

    With E xᵀ y = V S Uᵀ and a = u0^(1/D): W_1 = V a R_1ᵀ, W_l = R_(l-1) a R_lᵀ, W_D = R_(D-1) a Uᵀ
    with random R_l of orthonormal columns, so that the product is u0 V Uᵀ: every mode starts at u0
    and follows `mode_strength`, all layers balanced.

    Args:
      correlation: E xᵀ y of whitened inputs; float32 or wider.
      depth: number of kernels, two or more.
      u0: the initial strength, positive; a number or a traced scalar.
      width: of the hidden layers, at least min(n, m), the default.

    Raises:
      TypeError: a legacy key.
      ValueError: depth < 2, or a width below min(n, m).

    >>> first, last = aligned(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0])), 2, u0=0.25)
    >>> bool(jnp.allclose(first @ last, 0.25 * jnp.eye(2), atol=1e-6))
    True
    """
    tree.check_key(key)
    if correlation.ndim != 2:
        raise ValueError(f"a matrix (n, m) is due, and {correlation.shape} came")
    rank = min(correlation.shape)
    width = rank if width is None else width
    if depth < 2 or width < rank:
        raise ValueError(
            f"two kernels or more of width {rank} or more are due: depth {depth}, width {width}"
        )
    v, _, ut = jnp.linalg.svd(correlation, full_matrices=False)
    orthogonal = jax.nn.initializers.orthogonal()
    frames = [orthogonal(k, (width, rank), v.dtype) for k in jax.random.split(key, depth - 1)]
    frames = [v, *frames, ut.T]
    a = jnp.asarray(u0, v.dtype) ** (1 / depth)
    with jax.default_matmul_precision("highest"):
        return tuple(a * frames[i] @ frames[i + 1].T for i in range(depth))
