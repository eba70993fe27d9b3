"""Criticality: the weight and bias variances at which a deep signal neither dies nor explodes.

On the host, in float64. The scales are numbers to hand to JAX's initializers::

    point = init.edge_of_chaos(jnp.tanh, sigma_b=0.1)
    kernel_init = jax.nn.initializers.variance_scaling(point.sigma_w**2, "fan_in", "normal")
    bias_init = jax.nn.initializers.normal(point.sigma_b)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxkit.init import gauss
from jaxkit.init.kernel import variance_map

__all__ = [
    "Critical",
    "FiniteWidth",
    "Susceptibilities",
    "correlation_rate",
    "criticality",
    "edge_of_chaos",
    "finite_width",
    "fluctuation",
    "susceptibilities",
    "width_fluctuation",
]

_LARGEST = 1e6  # no fixed point is looked for beyond this variance


class Critical(NamedTuple):
    """Weights N(0, sigma_w²/fan_in), biases N(0, sigma_b²), and the variance q that they keep."""

    sigma_b: float
    sigma_w: float
    q: float


class Susceptibilities(NamedTuple):
    """How a layer scales a small change of the kernel, along the input and across it."""

    parallel: float
    perpendicular: float


class FiniteWidth(NamedTuple):
    """Kernel and variance of the kernel over draws, for layers 0 to len(widths)."""

    kernel: np.ndarray
    variance: np.ndarray


# ------------------------------------------------------------------ derivatives at the origin


def _slopes(phi: gauss.Activation) -> tuple[float, float] | None:
    """Return the slopes (left, right) of a φ with φ(λ x) = λ φ(x) for λ > 0, else None."""
    x = np.array([-300.0, -7.0, -1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0, 7.0, 300.0])
    y = gauss.evaluate(phi, x)[0] / np.abs(x)
    if np.allclose(y[:5], y[2], rtol=1e-6, atol=1e-9) and np.allclose(
        y[5:], y[7], rtol=1e-6, atol=1e-9
    ):
        return -float(y[2]), float(y[7])
    return None


def _name(phi: gauss.Activation) -> str:
    return getattr(phi, "__name__", "the activation")


def _at_zero(phi: gauss.Activation) -> tuple[float, float, float]:
    """Return φ(0), |φ'(0)| and E φ² / (q φ'(0)²) - 1 at a small q, φ'(0)² a mean of both sides.

    The last is a₁ q for a smooth φ. Where φ'' jumps at 0 (ELU) it is of the order √q, where φ is
    linear around 0 (hard tanh) less than any power: its sign is what counts, at the smallest q at
    which it stands out from rounding. NaN where φ is flat at 0.
    """
    values = gauss.evaluate(phi, np.array([-1e-10, 0.0, 1e-10]), 1)
    left, at, right = values[1]
    kinked = abs(right - left) > 1e-4 * max(1.0, abs(at))
    slope = math.sqrt((left**2 + right**2) / 2) if kinked else abs(float(at))
    growth = math.nan
    for q in (1e-8, 1e-4, 0.04) if slope > 0 else ():
        growth = gauss.moments(phi, q, order=0).m2 / (q * slope**2) - 1
        if abs(growth) > 1e-9:
            break
    return float(values[0, 1]), slope, growth


# -------------------------------------------------------------------------- edge of chaos


def _fixed_point_map(phi: gauss.Activation, q: float, sigma_b: float) -> float:
    """Return σ_b² + E φ² / E φ'²: the next variance if σ_w makes χ₁ = 1 at q."""
    m = gauss.moments(phi, q, order=1)
    if not 0 < m.d2 < math.inf:
        raise ValueError(
            f"{_name(phi)} has no edge of chaos: the mean of its squared slope is {m.d2} at q={q:g}"
        )
    return sigma_b**2 + m.m2 / m.d2


def _check_stable(phi: gauss.Activation, point: Critical) -> None:
    """Raise if the variance leaves the fixed point when σ_w and σ_b are held, at q = 0 from 1."""
    sigma_b, sigma_w, q = point
    parallel = lambda t: susceptibilities(phi, t, sigma_w=sigma_w).parallel
    if q > 0:
        leaves = [q] if abs(parallel(q)) > 1 + 1e-6 else []
    else:
        grows = lambda t: variance_map(phi, t, sigma_w=sigma_w) > t * (1 + 1e-6)
        leaves = [t for t in np.geomspace(1, 1e-8, 28) if grows(t)]
    if leaves:
        raise ValueError(
            f"{_name(phi)} has no stable edge of chaos at sigma_b = {sigma_b:g}: with sigma_w = "
            f"{sigma_w:.6g} held, the variance leaves the fixed point q = {q:.4g} (chi_par = "
            f"{parallel(leaves[0]):.6g} at {leaves[0]:.4g}, where 1 or less is due); the point "
            f"with chi_par = chi_perp = 1 is that of criticality({_name(phi)})"
        )


def edge_of_chaos(phi: gauss.Activation, sigma_b: float = 0.0) -> Critical:
    """Return the edge of chaos at σ_b: q = σ_b² + σ_w² E φ(√q Z)² and χ₁ = σ_w² E φ'(√q Z)² = 1.

    With χ₁ < 1 two inputs become one (ordered), with χ₁ > 1 neighbours part (chaotic); the squared
    gradient grows by χ₁ a layer backwards. The fixed point is the first one on the way from q = 1
    in the direction in which ``q <- σ_b² + E φ² / E φ'²`` moves. Smooth activations and a small σ_b
    keep correlations apart longest, see `correlation_rate`.

    The point is stable: with σ_w and σ_b held, the variance goes to q. GELU, SiLU and Mish have a
    stable one only from a σ_b on (about 0.42, 0.75 and 0.31): below it χ∥ > 1, and the variance
    explodes from a q that is a little larger. `criticality` has that σ_b, where χ∥ = 1.

    Positively homogeneous activations (linear, ReLU, leaky) keep any q, and have the one point
    σ_b = 0: q = 1 is returned. Where the fixed point is q = 0 (tanh, ELU or SELU at σ_b = 0), the
    limit (0, 1/|φ'(0)|, 0) is returned; at a kink φ'(0)² is the mean of both sides.

    Raises:
      ValueError: no fixed point below q = 1e6 (with the last q), one that is not stable (with χ∥),
        σ_b > 0 for a homogeneous activation, an activation that jumps (its χ₁ is infinite), or
        σ_b < 0.

    Reference: S. Hayou, A. Doucet, J. Rousseau, "On the Impact of the Activation Function on Deep
    Neural Networks Training", arXiv:1902.06853 (which does not ask for stability).

    >>> import jax
    >>> point = edge_of_chaos(jax.nn.relu)
    >>> point.sigma_b, round(point.sigma_w, 8)
    (0.0, 1.41421356)
    """
    if not sigma_b >= 0:
        raise ValueError(f"sigma_b >= 0 is due, and {sigma_b} came")
    slopes = _slopes(phi)
    if slopes is not None:
        if slopes == (0.0, 0.0):
            raise ValueError(f"{_name(phi)} is zero: it has no edge of chaos")
        if sigma_b > 0:
            raise ValueError(
                f"there is no edge of chaos with sigma_b > 0 ({sigma_b}) for homogeneous "
                f"activations ({_name(phi)} has slopes {slopes}): q would grow by sigma_b**2 a "
                "layer; use sigma_b=0"
            )
        return Critical(0.0, 1 / math.sqrt((slopes[0] ** 2 + slopes[1] ** 2) / 2), 1.0)
    point = _fixed_point(phi, float(sigma_b))
    _check_stable(phi, point)
    return point


def _fixed_point(phi: gauss.Activation, sigma_b: float) -> Critical:
    """Return the first fixed point of `_fixed_point_map` on the way from q = 1."""

    def excess(log_q):
        value = _fixed_point_map(phi, math.exp(log_q), sigma_b) / math.exp(log_q) - 1
        return value if abs(value) > 1e-12 else 0.0

    up = excess(0.0) > 0
    step = math.log(2.0) if up else -math.log(2.0)
    low, high = 0.0, step
    while (excess(high) > 0) == up:
        low, high = high, high + step
        if math.exp(high) > _LARGEST:
            raise ValueError(
                f"{_name(phi)} has no edge of chaos at sigma_b = {sigma_b}: the variance diverges "
                f"(last q = {math.exp(low):.4g})"
            )
        if math.exp(high) < 1e-6:
            value, slope, _ = _at_zero(phi)
            if sigma_b == 0 and abs(value) < 1e-6 and slope > 0:
                return Critical(0.0, 1 / slope, 0.0)
            if math.exp(high) < 1e-12:
                raise ValueError(
                    f"{_name(phi)} has no edge of chaos at sigma_b = {sigma_b}: the variance "
                    f"vanishes (last q = {math.exp(low):.4g})"
                )
    q = math.exp(gauss.root(excess, low, high))
    return Critical(sigma_b, gauss.moments(phi, q, order=1).d2 ** -0.5, q)


def correlation_rate(phi: gauss.Activation, q: float) -> float:
    """Return β_q = 2 E φ'(√q Z)² / (q E φ''(√q Z)²): on the edge of chaos, l (1 - c_l) -> β_q.

    The larger, the longer do deep layers tell two inputs apart.

    Raises:
      ValueError: φ has a kink (ReLU and its like): 1 - c_l falls as 1/l² then, for ReLU
        l² (1 - c_l) -> 9π²/2; or φ is linear and correlations never change.

    Reference: S. Hayou et al., arXiv:1902.06853, proposition 3.

    >>> import jax.numpy as jnp
    >>> point = edge_of_chaos(jnp.tanh, 0.2)
    >>> round(correlation_rate(jnp.tanh, point.q), 2)
    7.08
    """
    m = gauss.moments(phi, q)
    if m.dd2 == math.inf:
        raise ValueError(
            f"{_name(phi)} is relu-like (its derivative jumps): 1 - c_l falls as 1/l**2 and has no "
            "rate beta; the closed form for relu is l**2 (1 - c_l) -> 9 pi**2 / 2"
        )
    if m.dd2 == 0:
        raise ValueError(f"{_name(phi)} is linear: correlations never change, beta is infinite")
    return 2 * m.d2 / (q * m.dd2)


# --------------------------------------------------------------------------- criticality


def susceptibilities(phi: gauss.Activation, q: float, *, sigma_w: float = 1.0) -> Susceptibilities:
    """Return χ∥ = σ_w²/(2q²) E φ² (x² - q) and χ⊥ = σ_w² E φ'(x)², with x = √q Z.

    χ∥ is the derivative of the variance map, χ⊥ the factor of squared distances and gradients.

    Reference: D. A. Roberts, S. Yaida, B. Hanin, "The Principles of Deep Learning Theory",
    arXiv:2106.10165, chapter 5.

    >>> import jax
    >>> [round(chi, 9) for chi in susceptibilities(jax.nn.relu, 3.0, sigma_w=2**0.5)]
    [1.0, 1.0]
    """
    q = gauss.check_variance(q)
    weighted = gauss.expect(lambda x: phi(x) ** 2 * (x**2 / q - 1), q)
    perpendicular = gauss.moments(phi, q, order=1).d2
    return Susceptibilities(sigma_w**2 * weighted / (2 * q), sigma_w**2 * perpendicular)


def criticality(phi: gauss.Activation) -> Critical:
    """Return the critical point χ∥ = χ⊥ = 1 of an activation, with its fixed point q.

    The universality classes of the book:

    * scale-invariant (linear, ReLU, leaky): σ_b = 0, σ_w² = 2 / (a₊² + a₋²), any q (1 is returned);
    * K* = 0 (tanh, sin): φ(0) = 0, φ'(0) != 0 and a₁ = φ'''/φ' + ¾ (φ''/φ')² < 0 at 0: σ_b = 0,
      σ_w = 1/|φ'(0)|, q = 0, approached as 1/(-a₁ l). Where φ'' or φ' jumps at 0 (ELU, soft sign,
      SELU, φ'(0)² being the mean of both sides) there is no a₁, and σ_w² E φ² < q at small q is
      asked for: q falls as 1/l²;
    * half-stable (GELU, SiLU): q > 0 where χ∥ = χ⊥, found numerically on [1e-3, 1e3].

    Raises:
      ValueError: none of them (sigmoid, softplus), naming what is missing.

    Reference: D. A. Roberts, S. Yaida, B. Hanin, "The Principles of Deep Learning Theory",
    arXiv:2106.10165, sections 5.2 and 5.3.

    >>> import jax.numpy as jnp
    >>> criticality(jnp.tanh)
    Critical(sigma_b=0.0, sigma_w=1.0, q=0.0)
    """
    if _slopes(phi) is not None:
        return edge_of_chaos(phi)
    value, slope, growth = _at_zero(phi)
    if abs(value) < 1e-6 and growth < 0:
        return Critical(0.0, 1 / slope, 0.0)

    def difference(log_q):
        parallel, perpendicular = susceptibilities(phi, math.exp(log_q))
        return parallel / perpendicular - 1

    logs = np.linspace(math.log(1e-3), math.log(1e3), 25)
    values = [difference(t) for t in logs]
    found = []
    for i in range(len(logs) - 1):
        if values[i] * values[i + 1] < 0:
            q = math.exp(gauss.root(difference, logs[i], logs[i + 1]))
            sigma_w2 = 1 / gauss.moments(phi, q, order=1).d2
            sigma_b2 = q - sigma_w2 * gauss.moments(phi, q, order=0).m2
            if sigma_b2 >= 0:
                return Critical(math.sqrt(sigma_b2), math.sqrt(sigma_w2), q)
            found.append(f"at q = {q:.4g} it takes sigma_b**2 = {sigma_b2:.4g} < 0")
    raise ValueError(
        f"{_name(phi)} has no critical point: it is not scale-invariant; "
        f"K* = 0 takes phi(0) = 0 and E phi**2 < q phi'(0)**2 at small q, and phi(0) = "
        f"{value:.4g}, E phi**2 / (q phi'(0)**2) - 1 = {growth:.4g}; "
        "half-stable takes chi_par = chi_perp at some q > 0 with sigma_b**2 >= 0, and "
        + ("; ".join(found) or "there is no such q")
    )


# --------------------------------------------------------------------------- finite width


def _check_widths(widths: Sequence[int]) -> list[int]:
    if isinstance(widths, int | np.integer):
        raise ValueError(f"one width a layer is due, a sequence, and the single {widths} came")
    out = [int(n) for n in widths]
    if any(n <= 0 for n in out):
        raise ValueError(f"widths are positive, and {out} came")
    return out


def fluctuation(phi: gauss.Activation, widths: Sequence[int]) -> float:
    """Return E r² / (E r)² of a scale-invariant network, exactly: Π_l (1 + (3 A₄/A₂² - 1) / n_l).

    r = (1/n_L) Σ φ(z)² of the last layer over draws of Gaussian weights at criticality, A_k the
    mean of the k-th powers of the two slopes: the numerator is 2 for linear networks, 5 for ReLU.
    Fluctuations are governed by depth over width.

    Args:
      widths: n_l of every layer, in order.

    Raises:
      ValueError: an activation that is not scale-invariant, or widths that are no sequence of
        positive numbers.

    Reference: D. A. Roberts, S. Yaida, B. Hanin, arXiv:2106.10165, chapters 3 and 5.

    >>> import jax
    >>> round(fluctuation(jax.nn.relu, [64] * 8), 4)
    1.8254
    """
    slopes = _slopes(phi)
    if slopes is None or slopes == (0.0, 0.0):
        raise ValueError(
            f"{_name(phi)} is not scale-invariant; `finite_width` serves any activation"
        )
    second, fourth = (np.mean(np.power(slopes, k)) for k in (2, 4))
    return float(np.prod([1 + (3 * fourth / second**2 - 1) / n for n in _check_widths(widths)]))


def finite_width(
    phi: gauss.Activation,
    widths: Sequence[int],
    *,
    sigma_w: float,
    sigma_b: float = 0.0,
    q: float = 1.0,
) -> FiniteWidth:
    """Return mean and variance over draws of the kernel of each layer, to first order in 1/width.

    K' = σ_b² + σ_w² E φ², and V' = χ∥² V + σ_w⁴ (E φ⁴ - (E φ²)²) / n at x = √K Z: what the layer
    before passed on, plus what n units of this one add. V/K² is about ν L/n at criticality: ν = 2
    (linear), 5 (ReLU), 2/3 (tanh).

    Args:
      widths: n_l of each layer whose activations feed the next.
      q: the kernel of the first preactivations, which does not fluctuate.

    Returns:
      arrays of len(widths) + 1 entries that begin with q and 0.

    Raises:
      ValueError: widths that are no sequence of positive numbers, or a signal that dies.

    Reference: D. A. Roberts, S. Yaida, B. Hanin, arXiv:2106.10165, section 5.4.

    >>> out = finite_width(lambda x: x, [64] * 3, sigma_w=1.0)
    >>> round(float(out.variance[-1]) * 64 / 3, 9)
    2.0
    """
    kernels, variances = [gauss.check_variance(q)], [0.0]
    for n in _check_widths(widths):
        k = kernels[-1]
        second = gauss.moments(phi, k, order=0).m2
        fourth = gauss.moments(lambda x: phi(x) ** 2, k, order=0).m2
        parallel = susceptibilities(phi, k, sigma_w=sigma_w).parallel
        kernels.append(sigma_b**2 + sigma_w**2 * second)
        variances.append(parallel**2 * variances[-1] + sigma_w**4 * (fourth - second**2) / n)
        if kernels[-1] <= 0:
            raise ValueError(f"the signal dies at layer {len(kernels) - 1}: its variance is 0")
    return FiniteWidth(np.array(kernels), np.array(variances))


def width_fluctuation(preactivations: Float[Array, "draws *layers n"]) -> Float[Array, "*layers"]:
    """Return F = n Var(r) / (E r)², r = ‖z‖²/n, over draws of the weights, as measured.

    It grows with depth for Gaussian weights; for orthogonal weights (tanh) it stays bounded, and
    is 0 for a linear network.

    Args:
      preactivations: one input's z for each draw, with at least two draws.

    Raises:
      ValueError: fewer than two dimensions or draws.

    Reference: H. Day, Y. Kahn, D. A. Roberts, "Feature Learning and Generalization in Deep Networks
    with Orthogonal Weights", arXiv:2310.07765.

    >>> import jax.numpy as jnp
    >>> float(width_fluctuation(jnp.array([[1.0, 1.0], [3.0, 1.0]])))
    0.8888888...
    """
    if preactivations.ndim < 2 or preactivations.shape[0] < 2:
        raise ValueError(f"(draws >= 2, ..., width) are due, and {preactivations.shape} came")
    n = preactivations.shape[-1]
    r = (preactivations.astype("float32") ** 2).mean(-1)
    return n * r.var(0) / r.mean(0) ** 2
