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


def test_layers_of_a_scan_count_as_if_unrolled():
    """Also by stages of layers, with one cell more that all layers share."""
    keys = jax.random.split(KEY, 3)
    stack = jax.random.normal(keys[0], (4, 5, 5)) ** 3
    x = jax.random.normal(keys[1], (7, 5))
    layer = lambda x, w: jnp.tanh(x @ w)
    penalty = lambda fn, w: losses.kurtosis_penalty(fn, where="*")({"w": w}, x)[1]

    def unrolled(p, x):
        for i in range(4):
            x = layer(x, p["w"][i])
        return x

    scan = lambda x, w: jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]
    want = penalty(unrolled, stack)
    np.testing.assert_allclose(penalty(lambda p, x: scan(x, p["w"]), stack), want, rtol=1e-5)
    stages = lambda p, x: jax.lax.scan(lambda x, w: (scan(x, w), None), x, p["w"])[0]
    np.testing.assert_allclose(penalty(stages, stack.reshape(2, 2, 5, 5)), want, rtol=1e-5)
    # steps in time that share a leaf are tokens
    tokens = lambda p, x: jax.lax.scan(lambda _, row: (0, layer(row, p["w"])), 0, x)[1]
    np.testing.assert_allclose(
        penalty(tokens, stack[0]), losses.kurtosis(x @ stack[0]).mean(), rtol=1e-5
    )


def test_the_vector_of_a_token_is_all_that_the_leaf_puts_out():
    """Heads and their dimensions together, however the operation is written."""
    w = jax.random.normal(KEY, (6, 3, 8)).at[:, 1].mul(30)
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    flat = losses.kurtosis(x @ w.reshape(6, 24)).mean()
    for einsum in ("bsd,dhn->bshn", "bsd,dhn->bhsn", "bsd,dhn->hnbs"):
        fn = lambda p, x, einsum=einsum: jnp.einsum(einsum, x, p["kernel"])
        _, penalty = losses.kurtosis_penalty(fn)({"kernel": w}, x)
        np.testing.assert_allclose(penalty, flat, rtol=1e-5)
    heads = losses.kurtosis(jnp.einsum("bsd,dhn->bshn", x, w)).mean()
    assert flat > 2 * heads  # one head stands out, and within it none


def test_what_a_bias_adds_is_seen_where_the_bias_is_chosen():
    params = {"kernel": jax.random.normal(KEY, (5, 12)), "bias": jnp.zeros(12)}
    apply_fn = lambda p, x: x @ p["kernel"] + p["bias"]
    x = jax.random.normal(jax.random.key(1), (7, 5))
    penalty = lambda p, where: losses.kurtosis_penalty(apply_fn, where=where)(p, x)[1]
    np.testing.assert_allclose(penalty(params, "bias"), penalty(params, "kernel"), rtol=1e-5)
    out = params | {"bias": jnp.zeros(12).at[3].set(100.0)}
    np.testing.assert_allclose(penalty(out, "kernel"), penalty(params, "kernel"), rtol=1e-5)
    np.testing.assert_allclose(
        penalty(out, "bias"), losses.kurtosis(apply_fn(out, x)).mean(), rtol=1e-5
    )
    assert penalty(out, "bias") > 2 * penalty(params, "bias")


def test_outlier_channels_of_heads_and_of_each_layer():
    x = jax.random.normal(KEY, (4, 9, 2, 3, 8)).at[1, :, :, 2, 5].mul(80)  # layers, ..., heads
    found = jax.vmap(lambda x: losses.outlier_channels(x, axis=(-2, -1)))(x)
    assert found.shape == (4, 3, 8) and np.argwhere(found).tolist() == [[1, 2, 5]]
    flat = losses.outlier_channels(x[1].reshape(9, 2, 24))
    np.testing.assert_array_equal(flat.reshape(3, 8), found[1])


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
