"""Pseudo-iid weights: orthogonal, low-rank and block-sparse draws with the limit of iid ones.

Rows and columns are exchangeable, entries uncorrelated and of variance σ_w²/fan_in: a wide network
has the same Gaussian-process limit, hence the same edge of chaos, as with independent weights
(``jax.nn.initializers.variance_scaling(sigma_w**2, "fan_in", "normal")``). Biases are N(0, σ_b²).

A convolution draws the channel matrix of each tap independently, fan_in = taps * input channels.
There is no choice of fan: the limit is that of fan_in. All return initializers
``init(key, shape, dtype=None, out_sharding=None)`` and take ``in_axis=``, ``out_axis=`` and
``batch_axis=`` as ``jax.nn.initializers`` do.

Reference: T. Nait Saada, A. Naderi, J. Tanner, "Beyond IID weights: sparse and low-rank deep Neural
Networks are also Gaussian Processes", arXiv:2310.16597. Rectangular and convolutional kernels, and
how the matrices are drawn, are choices made here to satisfy the definition.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxkit._rank import decimal
from jaxkit.init import _layout

__all__ = ["block_sparse", "low_rank", "orthogonal"]


def _independent_taps(matrix: Callable[..., Array], **axes):
    """Return the initializer with ``matrix(key, n, m, dtype)`` over √taps at every tap."""

    def field(key, taps, fan_in, fan_out, dtype):
        count = math.prod(taps)
        draw = lambda key: matrix(key, fan_in, fan_out, dtype) / math.sqrt(count)
        out = draw(key)[None] if count == 1 else jax.vmap(draw)(jax.random.split(key, count))
        return out.reshape(*taps, fan_in, fan_out)

    return _layout.initializer(field, **axes)


def orthogonal(
    sigma_w: float = 1.0,
    *,
    in_axis: _layout.Axes = -2,
    out_axis: _layout.Axes = -1,
    batch_axis: _layout.Axes = (),
):
    """Draw Haar-distributed (partial) isometries with entries of variance σ_w²/fan_in.

    A square kernel is σ_w times an orthogonal matrix. A kernel with n inputs and m outputs has
    orthonormal columns (m <= n), or orthonormal rows times √(m/n) (m > n), so that E ‖x W‖²/m is
    σ_w² ‖x‖²/n in both: ``jax.nn.initializers.orthogonal`` scales its wide matrices otherwise, and
    takes the kernel of a convolution for one matrix.

    Args:
      sigma_w: standard deviation, as that of `edge_of_chaos`, not the variance that
        ``variance_scaling`` takes; a number or a traced scalar.

    Raises:
      ValueError: a shape of fewer than two dimensions.

    Reference: T. Nait Saada et al., arXiv:2310.16597; H. Day, Y. Kahn, D. A. Roberts, "Feature
    Learning and Generalization in Deep Networks with Orthogonal Weights", arXiv:2310.07765.

    >>> w = orthogonal(2.0)(jax.random.key(0), (3, 3))
    >>> bool(jnp.allclose(w @ w.T, 4 * jnp.eye(3), atol=1e-5))
    True
    """

    def matrix(key, n, m, dtype):
        scale = sigma_w * math.sqrt(max(1.0, m / n))
        return scale * jax.nn.initializers.orthogonal()(key, (n, m), dtype)

    return _independent_taps(matrix, in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis)


def low_rank(
    gamma: float,
    sigma_w: float = 1.0,
    *,
    in_axis: _layout.Axes = -2,
    out_axis: _layout.Axes = -1,
    batch_axis: _layout.Axes = (),
):
    """Draw σ_w C P / √r: C with r = ⌊gamma min(n, m)⌋ orthonormal columns (Haar), P of N(0, 1).

    The kernel has n inputs, m outputs, rank r, and entries of variance σ_w²/fan_in. A rank that
    does not grow with the width has no Gaussian limit.

    Args:
      gamma: in (0, 1], static.
      sigma_w: standard deviation; a number or a traced scalar.

    Raises:
      ValueError: gamma outside (0, 1], or a kernel with gamma * min(n, m) < 1.

    Reference: T. Nait Saada et al., arXiv:2310.16597.

    >>> w = low_rank(0.25)(jax.random.key(0), (8, 8))
    >>> int(jnp.linalg.matrix_rank(w))
    2
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma in (0, 1] is due, and {gamma} came")

    def matrix(key, n, m, dtype):
        r = math.floor(decimal(gamma) * min(n, m))
        if r < 1:
            raise ValueError(f"gamma={gamma} leaves a kernel of {n} inputs and {m} outputs no rank")
        left, right = jax.random.split(key)
        c = jax.nn.initializers.orthogonal()(left, (n, r), dtype)
        return sigma_w / math.sqrt(r) * (c @ jax.random.normal(right, (r, m), dtype))

    return _independent_taps(matrix, in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis)


def block_sparse(
    blocks: int,
    sigma_w: float = 1.0,
    *,
    in_axis: _layout.Axes = -2,
    out_axis: _layout.Axes = -1,
    batch_axis: _layout.Axes = (),
):
    """Draw a block-diagonal matrix of N(0, σ_w² blocks/fan_in), rows and columns then permuted.

    Inputs and outputs are dealt into `blocks` equal groups, each at random, and weights join equal
    groups: exactly 1/blocks of the entries are not zero, and entries have variance σ_w²/fan_in. The
    number of blocks is to stay fixed as the width grows.

    Args:
      blocks: a positive int that divides the numbers of inputs and outputs.
      sigma_w: standard deviation; a number or a traced scalar.

    Raises:
      ValueError: blocks < 1, or one that does not divide a kernel (nothing is padded).

    Reference: T. Nait Saada et al., arXiv:2310.16597.

    >>> w = block_sparse(4)(jax.random.key(0), (8, 16))
    >>> int((w != 0).sum())
    32
    """
    if blocks < 1:
        raise ValueError(f"one or more blocks are due, and {blocks} came")

    def matrix(key, n, m, dtype):
        if n % blocks or m % blocks:
            raise ValueError(f"{blocks} blocks do not divide {n} inputs and {m} outputs")
        rows, columns, values = jax.random.split(key, 3)
        row = jax.random.permutation(rows, jnp.arange(n) // (n // blocks))
        column = jax.random.permutation(columns, jnp.arange(m) // (m // blocks))
        dense = sigma_w * math.sqrt(blocks / n) * jax.random.normal(values, (n, m), dtype)
        return jnp.where(row[:, None] == column[None, :], dense, 0)

    return _independent_taps(matrix, in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis)
