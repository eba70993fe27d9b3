"""DeepScaleLM: weights whose every block returns unit moments, for the tokens' correlation there.

Its residual wiring is `jaxkit.init.residual.deepscale_wire`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkit._known import violates

__all__ = ["DeepScale", "deepscale", "relu_correlation", "relu_covariance"]

Number = float | Float[Array, ""]


class DeepScale(NamedTuple):
    """Standard deviations of normal weights, and the correlations that they were computed for.

    ``embedding`` is that of each of the summed embeddings, ``feed_forward`` of both its kernels,
    ``value_out`` of the value and the output kernel of each layer. ``correlation[l]`` is that of
    two tokens as layer l reads them, with that after the last layer at the end.
    """

    embedding: Float[Array, ""]
    query_key: Float[Array, ""]
    value_out: Float[Array, " layers"]
    feed_forward: Float[Array, ""]
    pooler: Float[Array, ""]
    correlation: Float[Array, " layers_plus_1"]


def relu_covariance(r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the covariance of ``relu(x)`` and ``relu(y)`` for standard normals of correlation r.

    ``(1/4 + arcsin(r) / 2 pi) r - (1 - sqrt(1 - r^2)) / 2 pi``; at r = 1 the variance of relu,
    ``(pi - 1) / 2 pi``.

    >>> round(float(relu_covariance(1.0)), 4)
    0.3408
    """
    r = jnp.asarray(r, jnp.result_type(float))
    root = jnp.sqrt(jnp.maximum(1 - r**2, 0))
    return (0.25 + jnp.arcsin(r) / (2 * math.pi)) * r - (1 - root) / (2 * math.pi)


def relu_correlation(r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return ``E[relu(x) relu(y)] / E[relu(x)^2]`` for standard normals of correlation r.

    ``r + (sqrt(1 - r^2) - r arccos(r)) / pi``, twice the covariance plus ``1 / pi``.

    >>> round(float(relu_correlation(0.0)), 4)
    0.3183
    """
    return 2 * relu_covariance(r) + 1 / math.pi


def deepscale(
    width: int,
    layers: int,
    *,
    dropout: Number = 0.0,
    lambda2: Number | None = None,
    beta2: Number | None = None,
    k: Number = 1.0,
    embeddings: int = 3,
    expansion: float = 4.0,
    correlation: Number = 0.221,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> DeepScale:
    """Return the standard deviations of DeepScaleLM for a Transformer of the given size.

    With p the dropout, d the width and ``r_l`` the correlation of two tokens at layer l::

        embedding      sqrt((1 - p) / embeddings)
        query_key      1 / sqrt(d)
        value_out[l]   sqrt(sqrt((1 - p) / r_l) / d)
        feed_forward   sqrt(v / d),  v * expansion * E[phi(sqrt(v) z)^2] = 1 - p
        pooler         1 / sqrt(d)

    where v is the variance of the hidden preactivations, ``sqrt(2 (1 - p) / expansion)`` for relu,
    so that with inputs of unit variance the feed-forward block and, if attention is uniform over
    many tokens, the attention block return unit second moments. (Attention over T tokens returns
    ``(r + (1 - r) / T) / r``.) The correlation follows each residual sum
    ``x <- sqrt(lambda2) x + sqrt(beta2) F(x)``, from ``correlation * (1 - p)`` and s = 1::

        c = 1 - p             after attention
        c = (1 - p) kappa(r)  after the feed-forward block, kappa = E[phi phi] / E[phi^2] at v
        r <- (lambda2 s r + beta2 c) / (lambda2 s + beta2),     s <- lambda2 s + beta2

    Draw the weights with ``jax.nn.initializers.normal(std)``, and let biases start at zero; the
    wire scales them with their block.

    All numbers but the sizes may be traced.

    Args:
      width: d.
      layers: the number of layers, each with an attention and a feed-forward block.
      dropout: p, on the output of every block and on the embedding.
      lambda2: the square of the skip's factor; ``1 - beta2`` unless given.
      beta2: the square of the branch's factor; ``k / layers`` unless given.
      k: see `deepscale_wire`.
      embeddings: how many embeddings are summed (token, position and segment: 3).
      expansion: the hidden width of the feed-forward block over d.
      correlation: that of two tokens of the input; 0.221 is that of BERT's text with its three
        embeddings.
      activation: phi, elementwise; relu has closed forms, others are integrated numerically.

    Raises:
      ValueError: sizes that are not positive, a dropout outside [0, 1), a correlation outside
        (0, 1], or negative factors (where their values are known).

    >>> std = deepscale(256, 4)
    >>> std.value_out.shape, round(float(std.feed_forward) * 16, 4)
    ((4,), 0.8409)

    Reference: Akhil Kedia, Mohd Abbas Zaidi, Sushil Khyalia, Jungho Jung, Harshith Goka, Haejun
    Lee, "Transformers Get Stable: An End-to-End Signal Propagation Theory for Language Models",
    arXiv 2403.09635 (for relu; other activations by the same condition).
    """
    if width < 1 or layers < 1 or embeddings < 1 or expansion <= 0:
        raise ValueError(
            f"width={width}, layers={layers}, embeddings={embeddings}, expansion={expansion}: all "
            "must be positive"
        )
    beta2 = k / layers if beta2 is None else beta2
    lambda2 = 1 - beta2 if lambda2 is None else lambda2
    _check("dropout", dropout, "is not in [0, 1)", lambda p: 0 <= p < 1)
    _check("correlation", correlation, "is not in (0, 1]", lambda r: 0 < r <= 1)
    _check("lambda2", lambda2, "is negative", lambda f: f >= 0)
    _check("beta2", beta2, "is negative", lambda f: f >= 0)
    keep = 1.0 - jnp.asarray(dropout)
    hidden, kappa = _hidden(activation, keep / expansion)

    def add(r, s, c):
        total = lambda2 * s + beta2
        return (lambda2 * s * r + beta2 * c) / total, total

    def layer(state, _):
        r, s = add(state[0], state[1], keep)
        return add(r, s, keep * kappa(r)), state[0]

    start = (correlation * keep, jnp.ones_like(keep))
    (last, _), along = jax.lax.scan(layer, start, None, length=layers)
    narrow = jnp.sqrt(jnp.full((), 1 / width))
    return DeepScale(
        embedding=jnp.sqrt(keep / embeddings),
        query_key=narrow,
        value_out=narrow * (keep / along) ** 0.25,
        feed_forward=narrow * jnp.sqrt(hidden),
        pooler=narrow,
        correlation=jnp.append(along, last),
    )


_Z = np.linspace(-9, 9, 1201)
_DENSITY = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


def _hermite(terms: int) -> Float[np.ndarray, "terms points"]:
    """Return the density times the orthonormal Hermite polynomials, at the points."""
    rows = [np.ones_like(_Z), _Z]
    for k in range(1, terms - 1):
        rows.append((_Z * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return np.stack(rows) * _DENSITY


def _hidden(phi: Callable[[Array], Array], due: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the v with ``v E[phi(sqrt(v) z)^2] = due``, and the map of correlations there.

    With the coefficients a_k of phi in Hermite polynomials, ``E[phi phi]`` at correlation r is the
    sum of ``a_k^2 r^k``; what is left of ``E[phi^2]`` after 64 terms counts as one more.
    """
    if phi is jax.nn.relu:
        return jnp.sqrt(2 * due), relu_correlation
    moment = lambda v: (_DENSITY * phi(jnp.sqrt(v) * _Z) ** 2).sum()

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        small = jnp.exp(middle) * moment(jnp.exp(middle)) < due
        return jnp.where(small, middle, low), jnp.where(small, high, middle)

    far = jnp.full((), 20.0, due.dtype)
    v = jnp.exp(jax.lax.fori_loop(0, 40, halve, (-far, far))[0])
    squares = (_hermite(64) @ phi(jnp.sqrt(v) * _Z)) ** 2
    squares = jnp.append(squares, jnp.maximum(moment(v) - squares.sum(), 0))
    return v, lambda r: (squares * r ** jnp.arange(65)).sum() / squares.sum()


def _check(name: str, value: Number, fault: str, holds: Callable[[float], bool]) -> None:
    if violates(holds, value):
        raise ValueError(f"{name}={value} {fault}")
