"""Kernels that start as the identity: ZerO, and IDInit's padded identity.

All return ``init(key, shape, dtype, out_sharding)``, as ``jax.nn.initializers`` do. A dense kernel
is ``(fan_in, fan_out)``, a convolution ``(*taps, fan_in, fan_out)``; other layouts are named as in
``jax.nn.initializers.variance_scaling``: `in_axis`, `out_axis` and `batch_axis` take an axis or
several, and the axes that are left are spatial. (An attention kernel ``(d, heads, size)`` has
``in_axis=0, out_axis=(1, 2)``, a scan over layers ``batch_axis=0``.)
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit.init._layout import Axes, initializer

__all__ = ["hadamard", "idi", "idiz", "relu_one", "zero"]


def hadamard(n: int, dtype=None) -> Float[Array, "n n"]:
    """Return the orthonormal Hadamard matrix: Sylvester's, times ``n ** -0.5``.

    ``H[i, j] = (-1)^popcount(i & j) / sqrt(n)``; symmetric, so that ``H @ H = I``. It is the fixed,
    untrained transform over channels of ZerO's residual networks: ``x @ hadamard(channels)``.

    Raises:
      ValueError: `n` is not a power of two.

    >>> hadamard(4).tolist()[1]
    [0.5, -0.5, 0.5, -0.5]
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, and n={n} came")
    return _hadamard(n, n, n, jnp.zeros((), dtype).dtype)


def _hadamard(rows: int, columns: int, n: int, dtype) -> Float[Array, "rows columns"]:
    i, j = jnp.arange(rows, dtype=jnp.uint32)[:, None], jnp.arange(columns, dtype=jnp.uint32)
    odd = (jax.lax.population_count(i & j) & 1).astype(bool)
    return jnp.where(odd, -1, 1) * jnp.asarray(n**-0.5, dtype)


def relu_one(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return ``max(x, 0)``, with derivative 1 at 0 (that of ``jax.nn.relu`` is 0 there).

    A stack that starts at zero has exactly zero pre-activations; with derivative 0 no gradient
    would ever pass them.

    >>> jax.grad(relu_one)(0.0).item(), jax.grad(jax.nn.relu)(0.0).item()
    (1.0, 0.0)
    """
    return jnp.where(x < 0, 0, x)


def zero(
    *, in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), feature_group_count: int = 1
):
    """ZerO: the identity, or a Hadamard matrix where the layer widens. Nothing is random.

    With n = fan_in and m = fan_out the kernel is::

        m <= n:   W[i, j] = 1 if i == j else 0                           (partial identity)
        m >  n:   W[i, j] = H_p[i, j] / sqrt(p),   p = the least power of two >= m

    with Sylvester's Hadamard matrix ``H_p``; so ``W @ W.T = I`` if m is a power of two, and not
    otherwise (n=64, m=100: the entries are off by up to 0.22). In a convolution it is the centre
    tap, and the other taps are zero: tap ``(k - 1) // 2``, which is the centre for even sizes as
    well under JAX's ``SAME`` padding. A partial identity alone would confine the residual
    components of all later kernels to rank fan_in of the first; the Hadamard matrix breaks that
    symmetry.

    In ZerO's residual networks the convolutions of the branches, the stem and the classifier start
    at zero (``jax.nn.initializers.zeros``), and dimensions change by a partial identity and a fixed
    transform ``x @ hadamard(channels)``. Those zeros need `relu_one`: ``jax.nn.relu`` has
    derivative 0 at zero and lets no gradient through.

    Args:
      in_axis: the input axis or axes.
      out_axis: the output axis or axes.
      batch_axis: axes over which the kernel is repeated (a scan over layers).
      feature_group_count: the groups of a grouped convolution, each of which gets its own block.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``; the draw does not depend on the key.

    Raises:
      ValueError: fewer than two dimensions, axes that overlap, or groups that do not divide the
        outputs.
      TypeError: a dtype that is not float.

    >>> zero()(jax.random.key(0), (3, 2)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    >>> zero()(jax.random.key(0), (2, 4)).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]

    Reference: Jiawei Zhao, Florian Schäfer, Anima Anandkumar, "ZerO Initialization: Initializing
    Neural Networks with only Zeros and Ones", arXiv 2110.12661.
    """

    def field(key, taps, n, m, dtype):
        del key
        if m <= n:
            centre = jnp.eye(n, m, dtype=dtype)
        else:
            centre = _hadamard(n, m, 1 << (m - 1).bit_length(), dtype)
        middle = tuple((k - 1) // 2 for k in taps)
        return jnp.zeros((*taps, n, m), dtype).at[middle].set(centre)

    return initializer(
        field,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
        groups=feature_group_count,
    )


def _padded(taps, n, m, dtype, *, alternate: bool = False) -> Float[Array, "*taps n m"]:
    """Return the identity over (channel, tap) x output, tiled along the longer side.

    With `alternate` the sign of the tiles alternates along the inputs.
    """
    rows = n * math.prod(taps)
    least = min(rows, m)
    i, j = jnp.arange(rows)[:, None], jnp.arange(m)
    sign = 1 - 2 * (i // least % 2) if alternate else 1
    matrix = jnp.where((i - j) % least == 0, sign, 0).astype(dtype)
    return jnp.moveaxis(matrix.reshape(n, *taps, m), 0, -2)


def idi(
    *,
    tau: float = 1.0,
    noise: float = 1e-6,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    feature_group_count: int = 1,
):
    """IDInit: the identity, tiled along the longer side so that it has full rank.

    With n = fan_in, m = fan_out and ``z ~ N(0, 1)``::

        W[i, j] = tau + noise * z[i, j]   if i == j (mod min(n, m)),   else 0

    A layer that widens copies its inputs, one that narrows sums them; nothing vanishes, as the
    inputs beyond m do in a partial identity. The noise (the paper's loose condition) separates the
    copies: without it two copies have the same gradient and stay equal. With ``noise=0`` a square
    kernel is exactly the identity.

    A convolution is the same matrix over (channel, tap) x output: output j copies tap ``j % k`` of
    channel ``j // k`` with k taps (patch-maintain). Identity starts want SGD with momentum. Behind
    a relu only inputs that are not negative pass unchanged, so chains of more than about a hundred
    relu layers need normalization. Embeddings are not for it.

    Args:
      tau: the value on the identity.
      noise: the standard deviation of the noise on it (bfloat16 rounds 1e-6 away: use 1e-2).
      in_axis: the input axis or axes; see `jaxkit.init.identity`.
      out_axis: the output axis or axes.
      batch_axis: axes over which the kernel is repeated, with other noise.
      feature_group_count: the groups of a grouped convolution.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``.

    Raises:
      ValueError: fewer than two dimensions, axes that overlap, or groups that do not divide the
        outputs.
      TypeError: a dtype that is not float.

    >>> idi(noise=0.0)(jax.random.key(0), (2, 5)).tolist()
    [[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0]]

    Reference: Yu Pan, Chaozheng Wang, Zekai Wu, Qifan Wang, Min Zhang, Zenglin Xu, "IDInit: A
    Universal and Stable Initialization Method for Neural Network Training", arXiv 2503.04626. The
    standard deviation of the noise is our choice.
    """

    def field(key, taps, n, m, dtype):
        identity = _padded(taps, n, m, dtype)
        return identity * (tau + noise * jax.random.normal(key, identity.shape, dtype))

    return initializer(
        field,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
        groups=feature_group_count,
    )


def idiz(
    *,
    eps: float = 1e-6,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    feature_group_count: int = 1,
):
    """IDInit's start near zero, for the last kernel of a residual branch and for the classifier.

    With n = fan_in and m = fan_out::

        W[i, j] = eps * (-1)^(i // min(n, m))   if i == j (mod min(n, m)),   else 0

    So a block ``x + F(x)`` whose last kernel this is starts at the identity to within eps; copies
    that an earlier `idi` made cancel in pairs. Unlike with ``zeros``, the kernels before it have
    gradients, of the order of eps, from the first step. Nothing is random.

    Args:
      eps: the value on the identity.
      in_axis: the input axis or axes; see `jaxkit.init.identity`.
      out_axis: the output axis or axes.
      batch_axis: axes over which the kernel is repeated.
      feature_group_count: the groups of a grouped convolution.

    Returns:
      ``init(key, shape, dtype=None, out_sharding=None)``; the draw does not depend on the key.

    Raises:
      ValueError: fewer than two dimensions, axes that overlap, or groups that do not divide the
        outputs.
      TypeError: a dtype that is not float.

    >>> idiz(eps=0.5)(jax.random.key(0), (4, 2)).tolist()
    [[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [0.0, -0.5]]

    Reference: Yu Pan, Chaozheng Wang, Zekai Wu, Qifan Wang, Min Zhang, Zenglin Xu, "IDInit: A
    Universal and Stable Initialization Method for Neural Network Training", arXiv 2503.04626. Which
    tiles take the minus sign is our reading.
    """

    def field(key, taps, n, m, dtype):
        del key
        return eps * _padded(taps, n, m, dtype, alternate=True)

    return initializer(
        field,
        in_axis=in_axis,
        out_axis=out_axis,
        batch_axis=batch_axis,
        groups=feature_group_count,
    )
