"""Noise on gradients: annealed, and as much as a smaller batch would have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["NoiseScale", "gradient_noise", "gradient_noise_scale", "weight_noise"]


def gradient_noise(
    variance: float | Array, *, key: PRNGKeyArray, decay: float | Array = 0.55
) -> optax.GradientTransformation:
    """Add annealed noise to every entry of the gradient: g + N(0, variance / (1 + t)^decay).

    Its place in the chain is part of the method: after clipping, before the optimizer::

        optax.chain(optax.clip_by_global_norm(1.0), gradient_noise(0.01, key=key), optax.sgd(lr))

    There the learning rate multiplies the noise; noise that comes after the rate is `langevin`.

    The law is that of ``optax.add_noise``, which draws in the dtype of the leaf: in bfloat16 128
    different numbers, none beyond 2.9 standard deviations, whose mean is off by 0.008 of one, a
    drift that adds up over the steps. Here the noise is drawn and added in float32, by the leaf's
    path. Use one key on all devices: with their own keys the mean over R of them has 1 / R of the
    variance.

    Args:
      variance: of the first step's noise (eta), not its standard deviation; the paper's are 0.01,
        0.3 and 1.
      key: a typed key.
      decay: gamma.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: a negative variance.

    Reference: A. Neelakantan, L. Vilnis, Q. V. Le, I. Sutskever, L. Kaiser, K. Kurach, J. Martens,
    "Adding Gradient Noise Improves Learning for Very Deep Networks", arXiv:1511.06807.

    >>> tx = gradient_noise(0.3, key=jax.random.key(0))
    >>> grads = {"w": jnp.zeros(40_000)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> round(float(updates["w"].std()), 2)  # sqrt(0.3)
    0.55
    """
    tree.check_key(key)
    if violates(lambda v: v >= 0, variance):
        raise ValueError(f"variance={variance}, and a number of at least 0 was due")

    def init(params):
        return optax.AddNoiseState(jnp.zeros((), jnp.int32), key)

    def update(updates, state, params=None):
        count = jnp.asarray(optax.safe_increment(state.count))
        std = jnp.sqrt(variance / count**decay)
        step = jax.random.fold_in(state.rng_key, state.count)
        keys = tree.keys(step, updates, "jaxkit.optim.gradient_noise")

        def add(g, k):
            if not tree.is_inexact(g):
                return g
            wide = tree.float32(g)
            return (wide + std * jax.random.normal(k, g.shape, wide.dtype)).astype(g.dtype)

        return jax.tree.map(add, updates, keys), optax.AddNoiseState(count, state.rng_key)

    return optax.GradientTransformation(init, update)


def weight_noise(key: PRNGKeyArray, batch: int, *, small: float | Array) -> Float[Array, " batch"]:
    """Return weights of the examples of a large batch: as much noise as a small one would have.

    z_n ~ N(1, batch / small - 1). The gradient (1 / M) sum_n z_n g_n has the mean of the plain one
    and the covariance E[g g^T] / m - mean mean^T / M with M = batch, m = small: that of a batch of
    m wherever examples differ by far more than their mean. Multiply the losses by it::

        loss = jnp.mean(weight_noise(key, 4096, small=128) * losses)

    Args:
      key: a typed key, another one at each step.
      batch: M.
      small: m, at most M.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: small outside (0, batch].

    Reference: E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", arXiv:1705.08741. (The paper has
    a variance proportional to M; M / m - 1 is the one that restores the noise of m.)

    >>> z = weight_noise(jax.random.key(0), 4096, small=1024)
    >>> round(float(z.var()), 0)
    3.0
    """
    tree.check_key(key)
    if violates(lambda m: (m > 0) & (m <= batch), small):
        raise ValueError(f"small={small}, and a number in (0, {batch}] was due")
    return 1 + jnp.sqrt(batch / jnp.asarray(small) - 1) * jax.random.normal(key, (batch,))


class NoiseScale(NamedTuple):
    """What `gradient_noise_scale` finds.

    signal: an unbiased estimate of |G|^2, the squared norm of the true gradient.
    noise: an unbiased estimate of tr(S), the summed variance of the gradients of single examples.
    """

    signal: Float[Array, "..."]
    noise: Float[Array, "..."]

    @property
    def scale(self) -> Float[Array, "..."]:
        """Return tr(S) / |G|^2, in examples: average signal and noise over steps before it."""
        return self.noise / self.signal


def gradient_noise_scale(
    small: Float[Array, "..."],
    large: Float[Array, "..."],
    *,
    small_batch: float | Array,
    large_batch: float | Array,
) -> NoiseScale:
    """Estimate the gradient noise scale from squared gradient norms at two batch sizes.

    As E |g_B|^2 = |G|^2 + tr(S) / B:

        signal = (B large - b small) / (B - b),   noise = (small - large) / (1 / b - 1 / B).

    B_simple = noise / signal is about the batch size up to which larger batches pay. Both come for
    free with data parallelism (the gradient of one device, and the mean of all) or with gradient
    accumulation. Each is unbiased but their quotient is not: average both over many steps first.

    Args:
      small: |g_b|^2 at the batch size b = small_batch (``optax.tree.norm(g) ** 2``).
      large: |g_B|^2 at the batch size B = large_batch, of the same params.
      small_batch, large_batch: b < B.

    Raises:
      ValueError: not 0 < b < B.

    Reference: S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota Team, "An Empirical Model of
    Large-Batch Training", arXiv:1812.06162.

    >>> found = gradient_noise_scale(4.0, 2.5, small_batch=8, large_batch=32)  # 2 + 16 / B
    >>> float(found.signal), float(found.noise), float(found.scale)
    (2.0, 16.0, 8.0)
    """
    if violates(lambda b, large: (b > 0) & (b < large), small_batch, large_batch):
        raise ValueError(
            f"small_batch={small_batch} and large_batch={large_batch}: "
            "0 < small_batch < large_batch was due"
        )
    small, large = jnp.asarray(small), jnp.asarray(large)
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    return NoiseScale(signal, noise)
