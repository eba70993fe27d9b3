"""Kurtosis against scipy and known laws; channels that stand out; what the penalty is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxkit import losses, reparam, trace

KEY = jax.random.key(0)


def test_kurtosis_is_that_of_scipy_and_of_known_laws():
    y = jax.random.normal(KEY, (6, 40)) ** 3
    want = stats.kurtosis(np.asarray(y, np.float64), axis=-1, fisher=False)
    np.testing.assert_allclose(losses.kurtosis(y, eps=0), want, rtol=1e-5)
    np.testing.assert_allclose(losses.kurtosis(y), want, rtol=1e-4)
    n = 1_000_000
    assert losses.kurtosis(jax.random.normal(KEY, n)) == pytest.approx(3, abs=0.05)
    assert losses.kurtosis(jax.random.laplace(KEY, n)) == pytest.approx(6, abs=0.3)


def test_scale_and_shift_do_not_matter():
    with jax.enable_x64(True):
        y = jax.random.normal(KEY, (50,), jnp.float64) ** 3
        k = lambda y: losses.kurtosis(y, eps=0.0)
        np.testing.assert_allclose(k(3.7 * y - 12), k(y), rtol=1e-12)
        slope = jax.grad(k)(y)
        assert abs(slope.sum()) < 1e-12 and abs(slope @ (y - y.mean())) < 1e-12
        assert jnp.linalg.norm(slope) > 1e-3


def test_constant_activations_and_half_precision():
    value, slope = jax.value_and_grad(lambda y: losses.kurtosis(y).sum())(jnp.full((2, 5), 3.0))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    y = 1e6 * jax.random.normal(KEY, (4, 64)).astype(jnp.bfloat16)
    k = losses.kurtosis(y)
    assert k.dtype == jnp.float32
    want = stats.kurtosis(np.asarray(y, np.float64), axis=-1, fisher=False)
    np.testing.assert_allclose(k, want, rtol=1e-4)


def test_the_penalty_sums_over_layers_and_uses():
    params = {"a": jax.random.normal(KEY, (5, 5)), "b": jnp.ones((5, 3))}
    apply_fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["a"]) @ p["b"]
    x = jax.random.normal(KEY, (7, 5))
    out, penalty = jax.jit(losses.kurtosis_penalty(apply_fn))(params, x)
    first = x @ params["a"]
    second = jnp.tanh(first) @ params["a"]
    last = jnp.tanh(second) @ params["b"]
    want = sum(losses.kurtosis(y).mean() for y in (first, second, last))
    np.testing.assert_allclose(out, last, rtol=1e-6)
    np.testing.assert_allclose(penalty, want, rtol=1e-5)
    _, one = losses.kurtosis_penalty(apply_fn, where="b")(params, x)
    np.testing.assert_allclose(one, losses.kurtosis(last).mean(), rtol=1e-5)


def test_outlier_channels():
    x = jax.random.normal(KEY, (8, 30, 64)).at[..., 5].mul(50).at[..., 9].mul(-40)
    found = losses.outlier_channels(x)
    np.testing.assert_array_equal(np.flatnonzero(found), [5, 9])
    assert losses.outlier_channels(x, factor=28.0).sum() <= 1
    # a mean over n channels: none can exceed n times it
    alone = jnp.zeros((3, 5)).at[:, 0].set(1.0)
    assert (
        losses.outlier_channels(alone).sum() == 0 < losses.outlier_channels(jnp.eye(64)[:1]).sum()
    )


def test_the_penalty_removes_a_planted_outlier_and_helps_to_quantize():
    """A linear net that computes the same with one hidden channel 50 times too large."""
    keys = jax.random.split(KEY, 4)
    x = jax.random.normal(keys[0], (256, 16))
    teacher = jax.random.normal(keys[1], (16, 4))
    up = jax.random.normal(keys[2], (16, 32)) / 4
    down = jax.random.normal(keys[3], (32, 4)) / 6
    params = {"up": up.at[:, 3].mul(50), "down": down.at[3].divide(50)}
    apply_fn = lambda p, x: x @ p["up"] @ p["down"]
    tx = optax.adam(optax.cosine_decay_schedule(3e-2, 800))

    def train(weight):
        def loss(p):
            out, penalty = losses.kurtosis_penalty(apply_fn, where="up")(p, x)
            return jnp.square(out - x @ teacher).mean() + weight * penalty

        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=800)[0][0]

    trained = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.05]))

    def measure(p):
        _, found = trace.taps(apply_fn)(p, x)
        hidden = found["down"].input
        size = jnp.abs(hidden).mean(0)
        clips = {"down": (hidden.min(), hidden.max())}
        exact, got = apply_fn(p, x), reparam.quantized_inputs(apply_fn, clips)(p, x)
        ratio, error = size.max() / jnp.median(size), jnp.square(got - exact).mean() / exact.var()
        fit = jnp.square(exact - x @ teacher).mean() / (x @ teacher).var()
        return ratio, error, fit, losses.outlier_channels(hidden).sum()

    (ratio, error, fit, count) = jax.vmap(measure)(trained)
    assert (fit < 0.01).all(), fit
    assert ratio[0] > 10 and ratio[1] < ratio[0] / 3, ratio
    assert error[1] < error[0] / 4, error
    assert count.tolist() == [1, 0]
