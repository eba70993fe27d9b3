"""Convolutions with orthonormal spectra.

A delta-orthogonal convolution, whose spectrum is the same orthogonal matrix at every frequency, is
``jax.nn.initializers.delta_orthogonal``.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit.init._layout import Axes, initializer

__all__ = ["convaware", "orthonormal_rows"]


def orthonormal_rows(key, rows: int, size: int, dtype=None) -> Float[Array, "rows size"]:
    """Return rows that are orthonormal in consecutive groups of `size`.

    Each group holds the eigenvectors of a symmetric matrix with standard normal entries on, and
    twice that variance off, the diagonal: ``a + a.T - diag(a)``; the last group is cut.

    Args:
      key: a random key.
      rows: the number of rows.
      size: the length of a row.
      dtype: float32 unless given.

    >>> rows = orthonormal_rows(jax.random.key(0), 3, 4)
    >>> bool(jnp.allclose(rows @ rows.T, jnp.eye(3), atol=1e-6))
    True
    """
    groups = -(-rows // size)
    a = jax.random.normal(key, (groups, size, size), jnp.zeros((), dtype).dtype)
    symmetric = a + jnp.swapaxes(a, 1, 2) - a * jnp.eye(size, dtype=a.dtype)
    _, vectors = jnp.linalg.eigh(symmetric)
    return jnp.swapaxes(vectors, 1, 2).reshape(groups * size, size)[:rows]


def convaware(
    *,
    scale: float = 2.0,
    eps_std: float = 0.05,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    feature_group_count: int = 1,
):
    """Convolution-aware initialization: spectra that are orthonormal across the input channels.

    For each output channel on its own, the input channels' real half-spectra of ``size`` entries
    (3 x 2 for 3 x 3 taps) are orthonormal in consecutive groups of ``size`` (`orthonormal_rows`);
    then::

        w = irfftn(spectrum, taps) + N(0, eps_std^2)
        W = w * sqrt(scale / fan_in / var(w)),      fan_in = prod(taps) * channels

    with the population variance over the whole kernel, so that its variance is exactly
    ``scale / fan_in``. The noise is not cosmetic: a real spectrum makes every filter even under
    ``tap -> -tap``, and 3 x 3 filters would span 5 of 9 dimensions. A kernel without spatial axes
    is ``jax.nn.initializers.orthogonal()``, and one with a single tap is Gaussian. In a depthwise
    convolution each filter has one row of its own basis.

    Args:
      scale: fan_in times the variance of the kernel; 2 suits relu.
      eps_std: the standard deviation of the noise, before the scaling.
      in_axis: the input axis or axes; the axes that are in none of the three are spatial.
      out_axis: the output axis or axes.
      batch_axis: axes over which kernels are stacked (a scan over layers), each drawn on its own.
      feature_group_count: the groups of a grouped convolution, each scaled on its own.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``.

    Raises:
      ValueError: a negative `scale` or `eps_std`, fewer than two dimensions, axes that overlap, or
        groups that do not divide the outputs.
      TypeError: a dtype that is not float.

    >>> kernel = convaware()(jax.random.key(0), (3, 3, 16, 8))
    >>> round(float(kernel.var()) * 3 * 3 * 16, 4)
    2.0

    Reference: Armen Aghajanyan, "Convolution Aware Initialization", arXiv 1702.06295. As in the
    author's code, the spectra are real. That code takes left singular vectors, which are the same
    vectors up to order and sign, but ill-conditioned where two eigenvalues are nearly opposite.
    """
    if scale < 0 or eps_std < 0:
        raise ValueError(f"scale={scale} and eps_std={eps_std}: neither may be negative")

    def field(key, taps, n, m, dtype):
        if not taps:
            return jax.nn.initializers.orthogonal()(key, (n, m), dtype)
        half = (*taps[:-1], taps[-1] // 2 + 1)
        axes = tuple(range(1, len(taps) + 1))

        def filters(key):  # the filters of one output channel, (n, *taps)
            basis, noise = jax.random.split(key)
            if math.prod(taps) == 1:
                return jax.random.normal(basis, (n, *taps), dtype)
            spectra = orthonormal_rows(basis, n, math.prod(half), dtype).reshape(n, *half)
            even = jnp.fft.irfftn(spectra, taps, axes)
            return even + eps_std * jax.random.normal(noise, even.shape, dtype)

        w = jnp.moveaxis(jax.vmap(filters)(jax.random.split(key, m)), (0, 1), (-1, -2))
        return w * jnp.sqrt(scale / (n * math.prod(taps)) / w.var())

    return initializer(
        field,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
        groups=feature_group_count,
    )
