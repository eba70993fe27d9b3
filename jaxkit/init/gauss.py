"""Gaussian integrals of any activation, exact to quadrature in float64, computed while tracing.

What the mean-field theory of wide networks asks of an activation φ are means over Z ~ N(0, 1) of
φ(√q Z), of its square, and of the squares of its derivatives. Gauss-Hermite rules get them wrong
where φ has a kink or is narrow; here the integral is cut into panels, and a panel is halved until
its two halves agree with it, so that kinks and bumps end up in panels of their own.

Everything in this file runs on the host in NumPy, at trace time if called under jit, and gives
Python floats: gains are constants of a program, like its shapes.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from jaxkit import tree

Activation = Callable[[Any], Any]

__all__ = ["Activation", "Moments", "expect", "moments", "pool_moment"]

_NODES, _ = np.polynomial.legendre.leggauss(16)
_END = 1 - 2e-9  # a panel's end, seen from inside
_TO_ENDS = np.linalg.solve(  # the interpolant through the nodes, at both ends
    np.polynomial.legendre.legvander(_NODES, 15).T,
    np.polynomial.legendre.legvander(np.array([-_END, _END]), 15).T,
)
_SPAN = 24.0  # standard deviations; the density is 1e-126 there
_DEPTH = 60  # halvings of a panel, and
_PANELS = 1 << 13  # panels in need of halving, past which the integral is said to diverge


class Moments(NamedTuple):
    """The moments of an activation at x = √q Z; `moments` says what infinities mean.

    m1 = E φ(x), m2 = E φ(x)², d2 = E φ'(x)², dd2 = E φ''(x)².
    """

    m1: float
    m2: float
    d2: float
    dd2: float


# ------------------------------------------------------------------------------------ values


def evaluate(fn: Callable[[Any], Any], x: np.ndarray, order: int = 0) -> np.ndarray:
    """Return fn and its first `order` derivatives at the points x, as float64 (order + 1, n).

    The points are padded to few shapes, so that JAX compiles its primitives once.
    """
    n = x.size
    block = 1024 if n <= 1024 else 1 << 14
    out = [_evaluate(fn, np.resize(x[i : i + block], block), order) for i in range(0, n, block)]
    return np.concatenate(out, axis=1)[:, :n]


def _evaluate(fn: Callable[[Any], Any], x: np.ndarray, order: int) -> np.ndarray:
    f = fn
    functions = [f]
    for _ in range(order):
        f = lambda x, f=f: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
        functions.append(f)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        try:
            values = [f(jnp.asarray(x)) for f in functions]
        except jax.errors.TracerArrayConversionError as error:
            raise TypeError(
                f"{_name(fn)} cannot be differentiated: a derivative needs a function of jax.numpy"
            ) from error
        for value in values:
            if np.shape(value) != x.shape:
                raise ValueError(
                    f"an elementwise activation is due, and {_name(fn)} maps shape {x.shape} to "
                    f"{np.shape(value)}"
                )
            if not tree.concrete(value):
                raise TypeError(
                    f"{_name(fn)} closes over a traced value: its moments are numbers, computed "
                    "while tracing"
                )
        return np.stack([np.asarray(value, np.float64) for value in values])


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", None) or repr(fn)


def _resolution(fn: Callable[[Any], Any]) -> float:
    """Return the eps of the dtype that fn computes in, and check that fn acts elementwise."""
    x = np.linspace(-2.0, 2.0, 1024)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        value = fn(jnp.asarray(x))
        dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"a real activation is due, and {_name(fn)} returns {dtype}")
    whole, alone = evaluate(fn, x)[0], evaluate(fn, np.full_like(x, x[300]))[0]
    eps = max(float(jnp.finfo(dtype).eps), 2.3e-16)
    if not math.isclose(whole[300], alone[300], rel_tol=100 * eps, abs_tol=100 * eps):
        raise ValueError(f"an elementwise activation is due, and {_name(fn)} mixes its entries")
    return eps


def check_variance(q: Any, name: str = "q") -> float:
    """Return q as a positive float."""
    if not tree.concrete(q):
        raise TypeError(f"{name} is a number, not a traced value: moments are computed on tracing")
    q = float(q)
    if not (q > 0 and math.isfinite(q)):
        raise ValueError(f"{name} must be positive and finite, and {q} came")
    return q


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the zero of f between two points at which it has different signs."""
    return float(brentq(f, low, high, xtol=1e-13))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- quadrature


def edges(scale: float, span: float = _SPAN, panels: int = 64, ratio: float = 16.0) -> np.ndarray:
    """Return panel edges on ± span · scale, as even on a log scale as an edge at 0 permits."""
    t = np.linspace(-1, 1, panels + 1)
    return scale * span * np.sinh(ratio * t) / math.sinh(ratio)


def nodes(a: np.ndarray, b: np.ndarray, n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return n Gauss-Legendre nodes and weights on the panels [a, b], along a new last axis."""
    x, w = np.polynomial.legendre.leggauss(n)
    middle, half = (a + b)[..., None] / 2, (b - a)[..., None] / 2
    return middle + half * x, half * w


def adaptive(
    f: Callable[[np.ndarray], np.ndarray], start: np.ndarray, rtol: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the integrals of the k rows of f and the edges of the panels that they took.

    f maps points (n,) to values (k, n); `start` holds the edges to begin with. A panel is halved
    until each row's integral over it changes by less than `rtol` times that of the row's |f|, and
    the interpolant through its nodes meets f at its ends (or a jump could hide beyond them).
    """

    def panels(a, b):
        x, w = nodes(a, b)
        ends = (a + b)[:, None] / 2 + (b - a)[:, None] / 2 * np.array([-_END, _END])
        y = f(np.concatenate([x, ends], axis=1).ravel()).reshape(-1, a.size, x.shape[1] + 2)
        if not np.isfinite(y).all():
            raise ValueError("the integrand is not finite")
        inner = y[..., :-2]
        beyond = (b - a) / 2 * (1 - _NODES[-1])
        gap = beyond * np.abs(inner @ _TO_ENDS - y[..., -2:]).max(-1)
        return (inner * w).sum(-1), gap, (np.abs(inner) * w).sum((1, 2))

    a, b = start[:-1], start[1:]
    parent, _, size = panels(a, b)
    total, taken = 0.0, [start]
    for _ in range(_DEPTH):
        middle = (a + b) / 2
        halves, gaps, _ = panels(np.concatenate([a, middle]), np.concatenate([middle, b]))
        left, right = halves[:, : a.size], halves[:, a.size :]
        error = np.abs(left + right - parent) + gaps[:, : a.size] + gaps[:, a.size :]
        bad = (error > rtol * size[:, None]).any(0)
        total = total + (left + right)[:, ~bad].sum(-1)
        if not bad.any():
            return total, np.sort(np.concatenate(taken))
        if bad.sum() > _PANELS:
            break
        taken.append(middle[bad])
        a, b = np.concatenate([a[bad], middle[bad]]), np.concatenate([middle[bad], b[bad]])
        parent = np.concatenate([left[:, bad], right[:, bad]], axis=1)
    raise ValueError(f"the integral does not converge near x = {a[0]:.6g}")


def density(x: np.ndarray, q: float) -> np.ndarray:
    """Return the density of N(0, q)."""
    return np.exp(-(x**2) / (2 * q)) / math.sqrt(2 * math.pi * q)


def _rtol(eps: float) -> float:
    return max(1e-13, 30 * eps)


def expect(fn: Callable[[Any], Any], q: float = 1.0) -> float:
    """Return E fn(√q Z), Z ~ N(0, 1), for any elementwise function of NumPy or JAX.

    Relative error about 1e-12 where fn is evaluated in float64 (JAX functions are, whatever
    ``jax_enable_x64`` says). Features of fn narrower than a twentieth of their distance from 0 can
    hide between the first nodes (about 1000 of them, log-spaced towards 0).

    Args:
      fn: elementwise, real; kinks, jumps and narrow bumps are found and resolved.
      q: the variance of its argument, a positive number.

    Raises:
      ValueError: q <= 0, fn not elementwise, or an integral that is infinite.
      TypeError: q or something that fn closes over is traced.

    >>> round(expect(jax.nn.relu) * math.sqrt(2 * math.pi), 12)
    1.0
    """
    q = check_variance(q)
    rtol = _rtol(_resolution(fn))
    f = lambda x: evaluate(fn, x) * density(x, q)
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            return float(adaptive(f, edges(math.sqrt(q)), rtol)[0][0])
        except ValueError as error:
            raise ValueError(f"E {_name(fn)}(sqrt({q:g}) Z) does not exist: {error}") from error


def moments(phi: Activation, q: float = 1.0, *, order: int = 2) -> Moments:
    """Return E φ, E φ², E φ'² and E φ''² at √q Z: what every gain rule is made of.

    Derivatives are those of distributions: where φ' jumps (a kink), φ'' is no square-integrable
    function and ``dd2`` is inf; where φ itself jumps, ``d2`` is inf too. Jumps are found by
    integration by parts: E φ'(x) g(x) = E φ(x) (z g(x) / √q - g'(x)) with g = exp(z / 2) holds for
    automatic derivatives exactly where there is none.

    Args:
      phi: any elementwise function, of jax.numpy if derivatives are asked for.
      q: the variance of the preactivation, a positive number.
      order: how many derivatives, 0 to 2; moments of further ones are NaN.

    Raises:
      ValueError: q <= 0, φ not elementwise, or an integral that is infinite.
      TypeError: a φ that cannot be differentiated (use ``order=0``), or a traced argument.

    >>> m = moments(jax.nn.relu)
    >>> round(m.m2, 12), round(m.d2, 12), m.dd2
    (0.5, 0.5, inf)
    """
    q = check_variance(q)
    eps = _resolution(phi)
    root = math.sqrt(q)

    def integrands(x):
        values = evaluate(phi, x, order)
        z, g = x / root, np.exp(x / (2 * root))
        rows = [values[0], *values**2]
        for low, high in itertools.pairwise(values):
            rows += [high * g, low * g * (z - 0.5) / root]
        return np.stack(rows) * density(x, q)

    with np.errstate(over="ignore", invalid="ignore"):
        try:
            total, _ = adaptive(integrands, edges(root), _rtol(eps))
        except ValueError as error:
            raise ValueError(
                f"the moments of {_name(phi)} at q = {q:g} do not exist: {error}"
            ) from error
    squares = [float(v) for v in total[1 : order + 2]] + [math.nan] * (2 - order)
    for k, (automatic, weak) in enumerate(total[order + 2 :].reshape(-1, 2)):
        size = math.sqrt(squares[k + 1]) + math.sqrt(squares[k]) / root
        if math.isfinite(size) and abs(automatic - weak) > 1e3 * _rtol(eps) * size:
            squares[k + 1 :] = [math.inf] * (2 - k)
    return Moments(float(total[0]), *squares)


def pool_moment(k: int, fn: Callable[[Any], Any] = np.square, extreme: str = "max") -> float:
    """Return E fn(max(Z_1, ..., Z_k)) for independent Z ~ N(0, 1): ∫ fn(z) k p(z) P(z)^(k-1) dz.

    With p and P the normal density and distribution function; by default the second moment of a
    maxout unit of rank k. ``extreme="max_abs"`` and ``"min_abs"`` give E fn(max |Z_i|) and
    E fn(min |Z_i|); with the default fn those of χ²₁ variables.

    Raises:
      ValueError: k < 1, or another `extreme`.

    >>> [round(pool_moment(k), 5) for k in (1, 2, 3)]
    [1.0, 1.0, 1.27566]
    """
    if not (isinstance(k, int | np.integer) and k >= 1):
        raise ValueError(f"k counts what the maximum is taken over, k >= 1, and {k} came")
    tails = {
        "max": lambda z: ndtr(z) ** (k - 1),
        "max_abs": lambda z: (2 * ndtr(np.abs(z)) - 1) ** (k - 1),
        "min_abs": lambda z: (2 * ndtr(-np.abs(z))) ** (k - 1),
    }
    if extreme not in tails:
        raise ValueError(f"extreme is one of {sorted(tails)}, and {extreme!r} came")

    def integrand(z):
        z = np.asarray(z)
        return k * np.asarray(fn(z if extreme == "max" else np.abs(z))) * tails[extreme](z)

    return expect(integrand)
