"""The z-loss: its gradient, what it sees that cross entropy does not, and half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit import losses

LOGITS = jax.random.normal(jax.random.key(0), (5, 7)) * 3


def test_its_gradient_is_the_probabilities_times_the_normalizer():
    with jax.enable_x64(True):
        logits = LOGITS.astype(jnp.float64)
        got = jax.grad(lambda z: losses.z_loss(z, scale=0.3).sum())(logits)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        np.testing.assert_allclose(got, 2 * 0.3 * lse * jax.nn.softmax(logits), rtol=1e-12)
        np.testing.assert_allclose(losses.z_loss(logits), 1e-4 * lse[:, 0] ** 2, rtol=1e-12)


def test_it_sees_a_shift_that_cross_entropy_does_not():
    labels = jnp.arange(5)
    entropy = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels)
    np.testing.assert_allclose(entropy(LOGITS + 9), entropy(LOGITS), atol=1e-5)
    lse = jax.nn.logsumexp(LOGITS, axis=-1)
    np.testing.assert_allclose(losses.z_loss(LOGITS + 9, scale=1.0), (lse + 9) ** 2, rtol=1e-5)
    # where it is least, nothing else about the logits has changed
    centered = LOGITS - lse[:, None]
    np.testing.assert_allclose(losses.z_loss(centered, scale=1.0), 0, atol=1e-10)
    np.testing.assert_allclose(jax.nn.softmax(centered), jax.nn.softmax(LOGITS), rtol=1e-5)


def test_half_precision_is_summed_in_float32():
    """4096 equal logits: a sum in bfloat16 would stop growing at 256."""
    logits = jnp.zeros((2, 4096), jnp.bfloat16)
    value = losses.z_loss(logits, scale=1.0)
    assert value.dtype == jnp.float32 and value.shape == (2,)
    np.testing.assert_allclose(value, np.log(4096) ** 2, rtol=1e-6)
