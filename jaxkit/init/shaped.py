"""The shaped Transformer: attention around the identity, and a relu that is almost linear.

Its residual wiring, ``x <- lambda x + gamma F(x)`` with ``lambda^2 + gamma^2 = 1``, is
`jaxkit.init.residual.convex_wire`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxkit import tree

__all__ = ["shaped_attention", "shaped_relu", "shaped_relu_moment", "shaped_scale"]


def shaped_scale(width: int, head_dim: int, *, tau0: float = 1.0) -> float:
    """Return the factor of ``q @ k.T`` in shaped attention: ``1 / (tau0 sqrt(width head_dim))``.

    It stands in place of the usual ``head_dim ** -0.5``, not beside it; for queries and keys with
    entries of unit variance. (In the paper's units, ``Y = X W_Q W_K^T X^T / width`` with standard
    normal weights and ``tau = tau0 sqrt(width head_dim)``, ``q = X W_Q / sqrt(width)``.)

    Raises:
      ValueError: a size or a `tau0` that is not positive.

    >>> shaped_scale(64, 16)
    0.03125
    """
    if min(width, head_dim, tau0) <= 0:
        raise ValueError(f"width={width}, head_dim={head_dim}, tau0={tau0}: all must be positive")
    return 1 / (tau0 * math.sqrt(width * head_dim))


def shaped_attention(
    logits: Float[Array, "*heads tokens tokens"],
    mask: Bool[Array, "*#heads tokens tokens"] | None = None,
    *,
    identity: float | Float[Array, "*#heads"] = 1.0,
    softmax: float | Float[Array, "*#heads"] = 1.0,
    uniform: float | Float[Array, "*#heads"] = 1.0,
) -> Float[Array, "*heads tokens tokens"]:
    """Return the shaped attention matrix ``I + softmax(logits) - U``.

    U is uniform over the allowed tokens: ``1 / tokens``, and under a causal mask ``1 / (i + 1)`` in
    row i. Rows sum to 1, and with logits 0 it is exactly the identity: tokens are not averaged at
    the start, so they do not collapse to one. The three terms may have coefficients, per head and
    trained; ``identity=uniform=0`` is plain attention.

    Scale the logits by `shaped_scale`, not by ``head_dim ** -0.5``. Put dropout on the product with
    the values, or on what the block returns, not inside.

    Args:
      logits: scaled products of queries and keys.
      mask: True where a token may be attended to.
      identity: the coefficient of the identity.
      softmax: that of the softmax.
      uniform: that of the uniform matrix.

    Returns:
      The matrix, in the dtype of `logits`. A row that is wholly masked attends to its own token
      alone, with the coefficient `identity`.

    Raises:
      ValueError: logits that are not square: there is no identity between different tokens.

    >>> shaped_attention(jnp.zeros((2, 2))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Reference: Lorenzo Noci, Chuning Li, Mufan Bill Li, Bobby He, Thomas Hofmann, Chris Maddison,
    Daniel M. Roy, "The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit",
    arXiv 2306.17759. The uniform matrix of a masked row is our choice.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits of shape (..., tokens, tokens) are due, and {logits.shape} came")
    allowed = jnp.ones((), bool) if mask is None else mask
    wide = tree.float32(logits)
    allowed = jnp.broadcast_to(allowed, wide.shape)
    count = allowed.sum(-1, keepdims=True)
    weights = jnp.where(allowed, jax.nn.softmax(wide, where=allowed | (count == 0)), 0)
    flat = allowed / jnp.maximum(count, 1)
    eye = jnp.eye(logits.shape[-1], dtype=wide.dtype)
    i, s, u = (jnp.asarray(c, wide.dtype)[..., None, None] for c in (identity, softmax, uniform))
    shaped = i * eye + (s * weights - u * flat)  # in this order exactly the identity at logits 0
    return jnp.broadcast_to(shaped, logits.shape).astype(logits.dtype)


def shaped_relu(
    x: Float[Array, "*shape"], width: int, *, plus: float = 0.0, minus: float = -1.0
) -> Float[Array, "*shape"]:
    """Return the relu with slopes ``s = 1 + c / sqrt(width)``: `plus` for x > 0, `minus` for x < 0.

    As width and depth grow together its effect over the whole depth stays finite. Its second
    moment on standard normal inputs is `shaped_relu_moment`.

    >>> shaped_relu(jnp.array([-1.0, 2.0]), 4).tolist()
    [-0.5, 2.0]

    Reference: Lorenzo Noci, Chuning Li, Mufan Bill Li, Bobby He, Thomas Hofmann, Chris Maddison,
    Daniel M. Roy, "The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit",
    arXiv 2306.17759.
    """
    positive, negative = _slopes(width, plus, minus)
    return jnp.where(x < 0, negative * x, positive * x)


def shaped_relu_moment(width: int, *, plus: float = 0.0, minus: float = -1.0) -> float:
    """Return ``E[shaped_relu(z)^2] = (s_plus^2 + s_minus^2) / 2`` for z ~ N(0, 1).

    A kernel of variance ``1 / (fan_in * moment)`` after the activation keeps the variance.

    >>> shaped_relu_moment(4)
    0.625
    """
    positive, negative = _slopes(width, plus, minus)
    return (positive**2 + negative**2) / 2


def _slopes(width: int, plus: float, minus: float) -> tuple[float, float]:
    if width < 1:
        raise ValueError(f"width={width}: a positive width is due")
    return 1 + plus / math.sqrt(width), 1 + minus / math.sqrt(width)
