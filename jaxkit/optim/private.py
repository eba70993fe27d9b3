"""Differentially private gradients: clip each example's, sum, add noise; and the accounts.

Per-example gradients are not formed for the kernels of dense layers: the norm of x' dy is computed
from x and dy while the backward pass goes by (ghost clipping), and a second backward pass of the
losses, each times its clipping factor, gives the sum.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxkit import trace, tree
from jaxkit._known import violates
from jaxkit.optim import _ghost
from jaxkit.optim._alone import centred_alone
from jaxkit.trace.axes import make_jaxpr

__all__ = [
    "Lot",
    "clipped_sum",
    "dp_epsilon",
    "dp_gradient",
    "dp_noise_multiplier",
    "dp_steps",
    "example_norms",
    "poisson_lot",
]

Loss = Callable[[PyTree, Any], Array]
EXCEEDED = 1e-9  # how probably a lot is larger than the default size


# --------------------------------------------------------------------------- per-example norms


def example_norms(
    loss_fn: Loss, params: PyTree, batch: Any, *, chunk: int | None = None
) -> Float[Array, " batch"]:
    """Return the L2 norm of every example's gradient over all float leaves together, in float32.

    A dense kernel that enters one product as it is (reordered, reshaped or widened at most) costs
    no gradient of its shape: with x the inputs (positions, in) of an example and d the gradients at
    the outputs (positions, out), |x' d|^2 = sum_ts (x_t . x_s) (d_t . d_s). What else there is
    (biases, norms, convolutions, embeddings, kernels that are masked, centred, rounded or otherwise
    a function of a leaf, that are used twice, or inside a scan or a custom derivative) has its
    gradient formed example by example.

    Norms are not below the true ones but for float32's rounding: of a kernel that sees several
    positions, 1.2e-7 (sum_t |x_t| |d_t|)^2 are added to the square, what its sum may have lost.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` of one example, without a batch axis. A model
        that mixes examples (BatchNorm) has no gradient of one example: it would take the mean and
        the variance of this one. With several positions that is a norm within the example (an
        InstanceNorm), and nothing tells it from one that is meant.
      params: any tree.
      batch: examples along the leading axis of every leaf.
      chunk: so many examples at a time (it divides the batch), to hold less memory; None: all.

    Raises:
      ValueError: a chunk that does not divide the batch.

    Warns:
      UserWarning: where an activation of the example has its own mean over one entry subtracted,
        which leaves zero: a BatchNorm that is not in its evaluation mode, without positions.

    Reference: I. Goodfellow, "Efficient Per-Example Gradient Computations", arXiv:1510.01799;
    X. Li, F. Tramèr, P. Liang, T. Hashimoto, "Large Language Models Can Be Strong Differentially
    Private Learners", arXiv:2110.05679.

    >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
    >>> x = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    >>> example_norms(loss, {"kernel": jnp.ones((2, 4))}, x).tolist()
    [10.0, 2.0]
    """
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    params, zero = _beside(batch, (params, jnp.zeros(())))
    own = tree.flatten(params)
    closed = make_jaxpr(loss_fn, params, (example,))
    if line := centred_alone(closed, len(own)):
        warnings.warn(
            f"at {line} the loss subtracts from an activation its own mean over one entry, and "
            "nothing is left: a norm over the batch (BatchNorm) sees one example at a time here. "
            "Use its running averages, or a norm within examples (LayerNorm, GroupNorm)",
            stacklevel=2,
        )
    ghosts = _ghost.kernels(closed, own)
    direct = {p: w for p, w in tree.chosen(params, tree.every(params)).items() if p not in ghosts}
    observed = {path: _ghost.observed(product) for path, product in ghosts.items()}

    def squared(example: Any) -> Array:
        def loss(direct: dict, zeros: dict) -> Array:
            full = tree.replace(params, direct)
            ops = {path: (fn, zeros[path]) for path, fn in observed.items()}
            return trace.replay(loss_fn, ops)(full, example) if ops else loss_fn(full, example)

        zeros = dict.fromkeys(ghosts, zero)
        grads, norms = jax.grad(loss, argnums=(0, 1))(direct, zeros)
        squares = [jnp.sum(jnp.abs(tree.float32(g)) ** 2) for g in grads.values()]
        return sum([*squares, *norms.values()], jnp.zeros(()))

    return jnp.sqrt(_in_chunks(jax.vmap(squared), batch, chunk))


def _beside(batch: Any, values: Any) -> Any:
    """Return values that vary over the same axes of shard_map as the batch does.

    The gradient at a value that is the same on all devices is summed over them, examples and all.
    """
    here = [jnp.any(x[:1] != x[:1]) & False for x in jax.tree.leaves(batch)]
    vary = functools.reduce(jnp.logical_or, here, jnp.zeros((), bool))
    return jax.tree.map(lambda v: jnp.where(vary, v, v) if tree.is_inexact(v) else v, values)


def _in_chunks(fn: Callable[[Any], Any], batch: Any, chunk: int | None) -> Any:
    n = len(jax.tree.leaves(batch)[0])
    if chunk is None or chunk >= n:
        return fn(batch)
    if n % chunk:
        raise ValueError(f"chunk={chunk} does not divide the batch of {n}")
    split = jax.tree.map(lambda x: x.reshape(n // chunk, chunk, *x.shape[1:]), batch)
    out = jax.lax.map(fn, split)
    return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), out)


# ------------------------------------------------------------------------------------ gradients


def clipped_sum(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    clip: float | Array,
    mask: Bool[Array, " batch"] | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> PyTree:
    """Return sum_i g_i min(1, C / |g_i|) over the examples, in float32 or wider.

    Norms are over all leaves together, and the loss is differentiated at the params in float32,
    whatever their dtype, so that each summand's norm is at most C (a loss that rounds inside keeps
    its rounding): replacing one example moves the sum by 2 C at most, leaving one out by C. See
    `example_norms` for the arguments and for what it costs.

    Args:
      clip: C; inf clips nothing.
      mask: examples to count (`poisson_lot` pads); default: all.
      axis_name: sum over this axis of pmap or shard_map as well.

    >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
    >>> x = jnp.array([[3.0, 4.0], [0.0, 0.5]])
    >>> total = clipped_sum(loss, {"kernel": jnp.ones((2, 1))}, x, clip=1.0)["kernel"]
    >>> bool(jnp.allclose(total, jnp.array([[0.6], [0.8 + 0.5]])))
    True
    """
    wide = jax.tree.map(lambda w: tree.float32(w) if tree.is_inexact(w) else w, params)
    wide = _beside(batch, wide)
    norms = example_norms(loss_fn, wide, batch, chunk=chunk)
    factors = jnp.minimum(1.0, clip / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
    if mask is not None:
        factors = jnp.where(mask, factors, 0.0)
    floats = tree.chosen(wide, tree.every(wide))

    def total(floats: dict, batch: Any, factors: Array) -> Array:
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(tree.replace(wide, floats), batch)
        return jnp.sum(factors * losses.astype(factors.dtype))

    if chunk is None or chunk >= len(factors):
        grads = jax.grad(total)(floats, batch, factors)
    else:
        cut = lambda x: x.reshape(-1, chunk, *x.shape[1:])
        parts = (jax.tree.map(cut, batch), cut(factors))
        add = lambda t, part: (jax.tree.map(jnp.add, t, jax.grad(total)(floats, *part)), None)
        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, floats), parts)
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    return tree.replace(jax.tree.map(jnp.zeros_like, wide), grads)


def dp_gradient(
    key: PRNGKeyArray,
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    clip: float | Array,
    noise_multiplier: float | Array,
    lot_size: float | Array,
    mask: Bool[Array, " batch"] | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> PyTree:
    """Return the gradient of DP-SGD: (sum_i g_i min(1, C / |g_i|) + N(0, (sigma C)^2 I)) / L.

    Hand it to any optimizer, without another division, and do not accumulate several of them into
    one update: each has its own noise. The guarantee (`dp_epsilon`) is for lots that each example
    joins with probability L / N independently (`poisson_lot`), not for shuffled epochs.

    Args:
      key: a typed key, another one at each step and the same on all devices.
      loss_fn, params, batch, chunk: as for `example_norms`.
      clip: C.
      noise_multiplier: sigma.
      lot_size: L, the expected number of examples in a lot, not the number that came.
      mask, axis_name: as for `clipped_sum`.

    Returns:
      A tree like params, in the dtypes of its leaves.

    Raises:
      ValueError: a clip or a lot size that is not above 0, a negative noise multiplier.
      TypeError: a legacy uint32 key.

    Reference: M. Abadi et al., "Deep Learning with Differential Privacy", arXiv:1607.00133.

    >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
    >>> args = (loss, {"kernel": jnp.ones((2, 1))}, jnp.array([[3.0, 4.0], [0.0, 0.5]]))
    >>> options = {"clip": 1.0, "noise_multiplier": 0.0, "lot_size": 2}
    >>> grads = dp_gradient(jax.random.key(0), *args, **options)["kernel"]
    >>> bool(jnp.allclose(grads, jnp.array([[0.6], [0.8 + 0.5]]) / 2))
    True
    """
    for name, value in (("clip", clip), ("lot_size", lot_size)):
        if violates(lambda v: v > 0, value):
            raise ValueError(f"{name}={value}, and a number above 0 was due")
    if violates(lambda v: v >= 0, noise_multiplier):
        raise ValueError(f"noise_multiplier={noise_multiplier}, and a number of at least 0 was due")
    grads = clipped_sum(
        loss_fn, params, batch, clip=clip, mask=mask, chunk=chunk, axis_name=axis_name
    )
    keys = tree.keys(key, params, "jaxkit.optim.dp_gradient")
    # infinite clipping bounds nothing, and only without noise does that mean something
    std = jnp.where(jnp.asarray(noise_multiplier) == 0, 0.0, noise_multiplier * jnp.float32(clip))

    def noisy(g: Any, w: Any, k: PRNGKeyArray) -> Any:
        if not tree.is_inexact(w):
            return g
        noise = std * jax.random.normal(k, g.shape, g.dtype)
        return ((g + noise) / lot_size).astype(w.dtype)

    return jax.tree.map(noisy, grads, params, keys)


class Lot(NamedTuple):
    """Which examples are in a lot: their indices, padded, and which of them count."""

    index: Int[Array, " size"]
    mask: Bool[Array, " size"]


def poisson_lot(
    key: PRNGKeyArray, num_data: int, rate: float | Array, size: int | None = None
) -> Lot:
    """Draw a lot that every example joins with probability `rate`, independently.

    Args:
      key: a typed key.
      num_data: N.
      rate: q = L / N.
      size: the static length of the result; by default the least that Binomial(N, q) exceeds with
        a probability of at most 1e-9 (`rate` must be a known number then). What exceeds it is left
        out.

    Raises:
      ValueError: a rate outside [0, 1]; a traced rate without a size.

    >>> lot = poisson_lot(jax.random.key(0), 1000, 0.1)
    >>> lot.index.shape, 60 < int(lot.mask.sum()) < 140
    ((161,), True)
    """
    tree.check_key(key)
    if violates(lambda q: (q >= 0) & (q <= 1), rate):
        raise ValueError(f"rate={rate}, and a probability was due")
    if size is None:
        if not tree.concrete(rate):
            raise ValueError("the rate is traced, and does not tell the size of the lot: give it")
        from scipy.stats import binom

        size = int(binom.isf(EXCEEDED, num_data, np.asarray(rate, np.float64)))
    joins = jax.random.bernoulli(key, rate, (num_data,))
    index = jnp.nonzero(joins, size=size, fill_value=num_data)[0]
    mask = index < num_data
    return Lot(jnp.where(mask, index, 0), mask)


# ------------------------------------------------------------------------------------- accounts


def _accountant(rate: float, noise_multiplier: float, steps: int) -> Any:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise ImportError(
            "privacy is accounted for by the package dp-accounting: pip install 'jaxkit[privacy]'"
        ) from None
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant = rdp.RdpAccountant()
    return accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))


def dp_epsilon(
    *,
    rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    num_data: int | None = None,
) -> float:
    """Return the epsilon that DP-SGD has spent at `delta`, by its Rényi divergences.

    Args:
      rate: q = L / N, with which each example joins a lot.
      noise_multiplier: sigma.
      steps: lots so far.
      delta: the probability with which the bound may fail, below 1 / N: publishing one example
        drawn at random is (0, 1 / N)-private.
      num_data: N, if delta is to be compared with 1 / N.

    Raises:
      ValueError: a delta outside (0, 1).
      ImportError: without the package dp-accounting.

    Warns:
      UserWarning: a delta of 1 / N or more.

    Reference: M. Abadi et al., arXiv:1607.00133; I. Mironov, K. Talwar, L. Zhang, "Rényi
    Differential Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}, and a probability between 0 and 1 was due")
    if num_data is not None and delta * num_data >= 1:
        warnings.warn(
            f"delta={delta} is not below 1 / N = {1 / num_data:.3g}: publishing one of the "
            f"{num_data} examples would be as private",
            stacklevel=2,
        )
    if steps == 0:
        return 0.0
    return float(_accountant(rate, noise_multiplier, steps).get_epsilon(delta))


def dp_steps(*, epsilon: float, rate: float, noise_multiplier: float, delta: float) -> int:
    """Return how many steps a budget of epsilon at delta (below 1 / N: `dp_epsilon`) allows.

    Raises:
      ValueError: not even one: the budget is spent by the first step; a delta outside (0, 1).
      ImportError: without the package dp-accounting.
    """
    spent = lambda steps: dp_epsilon(
        rate=rate, noise_multiplier=noise_multiplier, steps=steps, delta=delta
    )
    if spent(1) > epsilon:
        raise ValueError(
            f"a budget of epsilon={epsilon} is already spent by one step, which takes "
            f"{spent(1):.4g}"
        )
    high = 2
    while spent(high) <= epsilon and high < 2**40:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= epsilon else (low, middle)
    return low


def dp_noise_multiplier(*, epsilon: float, rate: float, steps: int, delta: float) -> float:
    """Return the least noise multiplier (to 1e-4) with which `steps` steps spend at most epsilon.

    `delta` is to be below 1 / N: see `dp_epsilon`.

    Raises:
      ValueError: a budget that is not above 0; a delta outside (0, 1).
      ImportError: without the package dp-accounting.
    """
    if not epsilon > 0:
        raise ValueError(f"a budget of epsilon={epsilon} is spent before the first step")
    spent = lambda sigma: dp_epsilon(rate=rate, noise_multiplier=sigma, steps=steps, delta=delta)
    high = 1.0
    while spent(high) > epsilon:
        high *= 2
    low = high / 2 if high > 1 else 0.05
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high
