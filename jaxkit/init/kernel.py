"""The kernel of a wide network, layer by layer: variances, correlations, and what follows.

Weights N(0, σ_w²/fan_in), biases N(0, σ_b²), preactivations that are Gaussian in the limit of
infinite width: a layer maps the variance q of a preactivation and the correlation c of those of
two inputs to the next ones, whatever the activation. On the host, in float64, like `moments`.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpy.polynomial import Chebyshev

from jaxkit import tree
from jaxkit.init import gauss

__all__ = [
    "Guessing",
    "Trajectory",
    "class_fractions",
    "correlation_map",
    "guessing_bias",
    "propagate",
    "variance_map",
]


class Trajectory(NamedTuple):
    """Variance and correlation of the preactivations of layers 0 (as given) to depth."""

    q: np.ndarray
    c: np.ndarray


class Guessing(NamedTuple):
    """The bias of an untrained two-class network over its draws; see `guessing_bias`."""

    correlation: float
    gamma: float
    variance: float


def _check_sigmas(sigma_w: float, sigma_b: float) -> None:
    if not sigma_w > 0 or not sigma_b >= 0:
        raise ValueError(f"sigma_w > 0 and sigma_b >= 0 are due: {sigma_w}, {sigma_b} came")


def variance_map(
    phi: gauss.Activation, q: float, *, sigma_w: float = 1.0, sigma_b: float = 0.0
) -> float:
    """Return the next layer's variance: q' = σ_b² + σ_w² E φ(√q Z)².

    Raises:
      ValueError: q or sigma_w not positive, or sigma_b negative.

    >>> import jax
    >>> round(variance_map(jax.nn.relu, 3.0, sigma_w=2**0.5), 12)
    3.0
    """
    _check_sigmas(sigma_w, sigma_b)
    return sigma_b**2 + sigma_w**2 * gauss.moments(phi, q, order=0).m2


# ------------------------------------------------------------------------------ correlations

_REACH = 10.0  # standard deviations


def _mesh(phi: gauss.Activation, q: float) -> np.ndarray:
    """Return edges of panels in which φ is a polynomial to rounding, its kinks among the edges."""
    root = math.sqrt(q)
    start = gauss.edges(root, _REACH, panels=32, ratio=8.0)
    f = lambda x: gauss.evaluate(phi, x) * gauss.density(x, q)
    fine = gauss.adaptive(f, start, 1e-13)[1]
    tiny = np.flatnonzero(np.diff(fine) < 1e-5 * root)  # panels that close in on a kink
    if tiny.size == 0:
        return fine
    clusters = np.split(tiny, np.flatnonzero(np.diff(tiny) > 1) + 1)
    closest = [cluster[np.argmin(fine[cluster + 1] - fine[cluster])] for cluster in clusters]
    kinks = [(fine[i] + fine[i + 1]) / 2 for i in closest]
    return gauss.adaptive(f, np.sort(np.concatenate([start, kinks])), 1e-11)[1]


def _deficit(phi: gauss.Activation, q: float, thetas: np.ndarray) -> np.ndarray:
    """Return ½ E (φ(u) - φ(v))² for u, v of variance q and correlation cos θ, at every θ.

    With u, v = x ± h, the half difference h and the mean x are independent, of variances
    q (1 ∓ cos θ) / 2. For each h the panels in x are those of φ shifted by ± h, so that every kink
    is the edge of a panel, and no cancellation spoils small θ.
    """
    root = math.sqrt(q)
    mesh = _mesh(phi, q)
    grid = np.linspace(-_REACH, _REACH, 17)
    out = []
    for theta in thetas:
        a, b = root * abs(math.cos(theta / 2)), root * abs(math.sin(theta / 2))
        ends = np.sort(np.concatenate([mesh[mesh > 0], b * grid[grid >= 0]]).clip(0, b * _REACH))
        h, dh = (part.ravel() for part in gauss.nodes(ends[:-1], ends[1:], 10))
        h, dh = h[dh > 0], dh[dh > 0] * 2 * gauss.density(h[dh > 0], b * b)
        shifted = np.concatenate([mesh + h[:, None], mesh - h[:, None]], axis=1)
        inner = np.concatenate([shifted, np.broadcast_to(a * grid, (h.size, grid.size))], axis=1)
        inner = np.sort(inner.clip(-a * _REACH, a * _REACH), axis=1)
        rows, panel = np.nonzero(np.diff(inner, axis=1) > 0)
        x, dx = gauss.nodes(inner[rows, panel], inner[rows, panel + 1], 10)
        u = gauss.evaluate(phi, (x + h[rows, None]).ravel())
        v = gauss.evaluate(phi, (x - h[rows, None]).ravel())
        values = (0.5 * (u - v) ** 2).reshape(x.shape) * dx * gauss.density(x, a * a)
        out.append(float(values.sum(1) @ dh[rows]))
    return np.array(out)


def correlation_map(
    phi: gauss.Activation, q: float, *, sigma_w: float = 1.0, sigma_b: float = 0.0
) -> Callable[[float | np.ndarray], np.ndarray]:
    """Return the map of correlations of a layer: c' = (σ_b² + σ_w² E φ(u) φ(v)) / q'.

    u, v = √q Z₁, √q (c Z₁ + √(1 - c²) Z₂) and q' is the variance map of q. The map is built once
    (a Chebyshev series in arccos c, through quadratures that follow the kinks of φ; relative error
    of 1 - c' about 1e-9) and is cheap to iterate.

    Args:
      phi: any elementwise activation.
      q: the variance of both preactivations, a positive number; a fixed point of `variance_map` if
        the map is to be iterated.

    Returns:
      a function of c in [-1, 1], a number or a NumPy array.

    Raises:
      ValueError: q or sigma_w not positive, sigma_b negative, φ = 0 at q, or a φ whose map no
        series of 256 terms resolves (far narrower than √q).

    >>> import jax
    >>> relu = correlation_map(jax.nn.relu, 1.0, sigma_w=2**0.5)
    >>> round(float(relu(0.0)) * np.pi, 9)
    1.0
    """
    following = variance_map(phi, q, sigma_w=sigma_w, sigma_b=sigma_b)
    if following == 0:
        raise ValueError(f"the activation is zero at q = {q:g}: there is no correlation")
    for n in (16, 32, 64, 128, 256):
        thetas = np.pi * (1 + np.cos((np.arange(n) + 0.5) * np.pi / n)) / 2
        ratios = _deficit(phi, q, thetas) / (1 - np.cos(thetas))
        series = Chebyshev.fit(thetas, ratios, n - 1, domain=[0, np.pi])
        size = np.abs(series.coef)
        if size[-4:].max() <= 1e-10 * size.max():
            break
    else:
        raise ValueError(f"phi is too narrow or too jagged at q = {q:g}: the map is not resolved")
    series = series.trim(1e-13 * size.max())

    def following_correlation(c):
        c = np.asarray(c, np.float64)
        if np.any(np.abs(c) > 1 + 1e-12):
            raise ValueError(f"a correlation lies in [-1, 1], and {c} came")
        c = c.clip(-1, 1)
        return 1 - sigma_w**2 * (1 - c) * series(np.arccos(c)) / following

    return following_correlation


def propagate(
    phi: gauss.Activation,
    depth: int,
    *,
    sigma_w: float,
    sigma_b: float = 0.0,
    q: float = 1.0,
    c: float = 0.0,
) -> Trajectory:
    """Iterate the variance and the correlation map through `depth` layers.

    Args:
      q, c: variance and correlation of the preactivations of the first layer.

    Returns:
      arrays of depth + 1 entries that begin with q and c.

    Raises:
      ValueError: depth < 0, |c| > 1, sigmas as in `correlation_map`, or a signal that dies.

    Reference: S. Hayou, A. Doucet, J. Rousseau, "On the Impact of the Activation Function on Deep
    Neural Networks Training", arXiv:1902.06853.

    >>> import jax
    >>> np.round(propagate(jax.nn.relu, 2, sigma_w=2**0.5).c, 4).tolist()
    [0.0, 0.3183, 0.4937]
    """
    _check_sigmas(sigma_w, sigma_b)
    if depth < 0 or abs(c) > 1:
        raise ValueError(f"depth >= 0 and |c| <= 1 are due: {depth}, {c} came")
    qs, cs, steady = [gauss.check_variance(q)], [float(c)], None
    for _ in range(depth):
        q, c = qs[-1], cs[-1]
        if steady is None or abs(steady[0] - q) > 1e-13 * q:
            following = variance_map(phi, q, sigma_w=sigma_w, sigma_b=sigma_b)
            if abs(following - q) <= 1e-13 * q and depth > 32:
                steady = q, correlation_map(phi, q, sigma_w=sigma_w, sigma_b=sigma_b)
        if steady is not None and abs(steady[0] - q) <= 1e-13 * q:
            qs.append(q)
            cs.append(float(steady[1](c)))
            continue
        if following <= 0:
            raise ValueError(f"the signal dies at layer {len(qs)}: its variance is 0")
        deficit = _deficit(phi, q, np.array([math.acos(c)]))[0] if c < 1 else 0.0
        qs.append(following)
        cs.append(1 - sigma_w**2 * deficit / following)
    return Trajectory(np.array(qs), np.array(cs))


# --------------------------------------------------------------------- initial guessing bias


def guessing_bias(
    phi: gauss.Activation,
    depth: int,
    *,
    sigma_w: float = 1.0,
    q: float = 1.0,
) -> Guessing:
    """Return how unevenly an untrained network without biases guesses between two classes.

    With c the correlation of the last hidden preactivations' images φ of two independent inputs
    (c₀ = 0: centred, independent inputs), the output's mean over the data has, over draws of the
    weights, γ = c / (1 - c) times the variance of the output over the data. The fraction of the
    data that is given class 0 is f₀ = P(√γ Z), P the normal distribution function, whose variance
    is arcsin(c) / (2π): 0 is no bias, 1/12 a uniform f₀, 1/4 one class takes all.

    Args:
      phi: the activation of the hidden layers; odd ones (tanh) have no bias.
      depth: the number of hidden layers, 1 or more.
      sigma_w: of the hidden weights; homogeneous activations do not depend on it.
      q: the variance of the first preactivations.

    Raises:
      ValueError: depth < 1, or as `propagate`.

    Reference: E. Francazi, A. Lucchi, M. Baity-Jesi, "Initial Guessing Bias: How Untrained Networks
    Favor Some Classes", arXiv:2306.00809 (the arcsine is derived here from f₀'s second moment,
    an orthant probability).

    >>> import jax
    >>> bias = guessing_bias(jax.nn.relu, 1)
    >>> round(bias.correlation, 4), round(bias.gamma, 4), round(bias.variance, 4)
    (0.3183, 0.4669, 0.0516)
    """
    if depth < 1:
        raise ValueError(f"one or more hidden layers are due, and depth = {depth} came")
    c = float(propagate(phi, depth, sigma_w=sigma_w, q=q).c[-1])
    gamma = c / (1 - c) if c < 1 else math.inf
    return Guessing(c, gamma, math.asin(c) / (2 * math.pi))


def class_fractions(
    logits: Float[Array, "*draws n k"], *, axis_name: str | None = None
) -> Float[Array, "*draws k"]:
    """Return the fraction of the n examples that each of the k classes wins.

    float32; the classes add up to 1. One logit (k = 1) is a classifier by its sign: class 0 wins
    where it is positive. An example whose largest logit is tied (bfloat16 often has them) has no
    winner, and is left out. The fractions of a draw are NaN where all its examples tie, as those of
    a zero-initialized head do (a warning tells, where the values are known), or a logit is NaN.

    Args:
      axis_name: of ``pmap`` or ``shard_map``, where the examples are split over devices.

    Raises:
      ValueError: fewer than two dimensions, or no example.

    >>> class_fractions(jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [5.0, -1.0]])).tolist()
    [0.75, 0.25]
    """
    if logits.ndim < 2 or logits.shape[-2] == 0:
        raise ValueError(f"logits (..., examples, classes) are due, and {logits.shape} came")
    known = tree.concrete(logits) and getattr(logits, "is_fully_addressable", True)
    if known and not np.asarray(logits).any((-2, -1)).all():
        warnings.warn("all logits are zero (a zero-initialized head?): no class wins", stacklevel=2)
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([logits, -logits], axis=-1)
    wins = logits == logits.max(-1, keepdims=True)
    winners = wins.sum(-1, keepdims=True)
    won = (wins & (winners == 1)).sum(-2, dtype=jnp.float32)
    undefined = (winners == 0).sum(-2)
    if axis_name is not None:
        won, undefined = lax.psum((won, undefined), axis_name)
    decided = won.sum(-1, keepdims=True)
    defined = (decided > 0) & (undefined == 0)
    return jnp.where(defined, won / jnp.maximum(decided, 1), jnp.nan)
