"""Max-W's mixtures, and linear heads behind dropout: closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jaxkit import nn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def test_the_best_operation_counts_whole_and_the_others_less():
    logits = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
    found, w = nn.max_w(logits), jax.nn.softmax(logits)
    best = np.argmax(w, axis=1)
    np.testing.assert_allclose(found[np.arange(4), best], 1, rtol=1e-6)
    others = np.asarray(found)[np.arange(5) != best[:, None]]
    assert np.all((others > 0) & (others < 1))
    np.testing.assert_allclose(found - w, (1 - w.max(1))[:, None] * np.ones(5), atol=1e-6)
    np.testing.assert_array_equal(nn.max_w(jnp.full(6, 0.3)), 1)  # the plain sum
    np.testing.assert_allclose(nn.max_w(jnp.array([0.0, 200.0, 0.0])), [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_slopes_of_the_mixture_by_finite_differences(stop_gradient):
    with jax.enable_x64(True):
        logits, outputs = jnp.asarray(RNG.normal(size=4)), jnp.asarray(RNG.normal(size=(4, 3)))
        mix = lambda z: jnp.sum(nn.max_w(z, stop_gradient=stop_gradient) @ outputs)
        frozen = jnp.max(jax.nn.softmax(logits))
        plain = lambda z: jnp.sum((1 - frozen + jax.nn.softmax(z)) @ outputs)
        same = plain if stop_gradient else mix
        steps = 1e-6 * jnp.eye(4)
        want = [(same(logits + e) - same(logits - e)) / 2e-6 for e in steps]
        np.testing.assert_allclose(jax.grad(mix)(logits), want, rtol=1e-6, atol=1e-9)
        best = jnp.argmax(logits)
        slope = jax.grad(lambda z: nn.max_w(z, stop_gradient=stop_gradient)[best])(logits)
        assert np.any(slope != 0) == stop_gradient


# ------------------------------------------------------------------------------------- dropout


def test_the_head_is_where_training_with_dropout_ends():
    """The slope of the expected loss is 0 there, over all 2^3 masks."""
    x, y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((12, 3), (12, 2)))
    rate = 0.75
    w = nn.dropout_head(x, y, rate=rate)
    loss = lambda w, mask: jnp.mean(jnp.sum(((x * mask / (1 - rate)) @ w - y) ** 2, -1))
    # one mask for all examples has the same expected loss as one for each
    masks = jnp.asarray([[(i >> j) & 1 for j in range(3)] for i in range(8)], jnp.float32)
    chance = jnp.prod(jnp.where(masks == 1, 1 - rate, rate), axis=1)
    slope = jax.grad(lambda w: chance @ jax.vmap(lambda m: loss(w, m))(masks))(w)
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    plain = nn.dropout_head(x, y, rate=0.0)
    np.testing.assert_allclose(plain, jnp.linalg.lstsq(x, y)[0], atol=1e-5)


def test_descent_with_flax_dropout_comes_to_the_head():
    x, y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((40, 5), 40))
    drop = linen.Dropout(0.9, deterministic=False)

    def step(w, t):
        key = jax.random.fold_in(KEY, t)
        masked = lambda w, k: jnp.mean((drop.apply({}, x, rngs={"dropout": k}) @ w - y) ** 2)
        g = jax.vmap(jax.grad(masked), (None, 0))(w, jax.random.split(key, 16)).mean(0)
        w = w - 0.02 / (1 + t / 50) * g
        return w, w

    path = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(5), jnp.arange(1500))[1])()
    np.testing.assert_allclose(path[-500:].mean(0), nn.dropout_head(x, y, rate=0.9), atol=0.01)


def test_at_a_rate_near_one_each_feature_is_used_alone():
    x, y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 4), 30))
    x = x.at[:, 3].set(x[:, 0] + 0.1 * x[:, 1]).at[:, 2].set(0)
    rate = 0.9999
    w = nn.dropout_head(x, y, rate=rate)
    alone = x.T @ y / jnp.where(jnp.arange(4) == 2, 1, jnp.sum(x**2, 0))
    np.testing.assert_allclose(w / (1 - rate), alone, rtol=5e-3, atol=1e-4)
    assert w[2] == 0
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"rate={rate}"):
            nn.dropout_head(x, y, rate=rate)
