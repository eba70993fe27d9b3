"""Stochastic depth and ghost batches: limits, expectations, flax as an oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jaxkit import nn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def test_expected_depth_and_ends():
    p = nn.linear_decay(54)
    np.testing.assert_allclose(p.sum(), (3 * 54 - 1) / 4, rtol=1e-6)
    assert p[0] < 1 and float(p[-1]) == 0.5
    assert nn.linear_decay(3, 1.0).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="last=0"):
        nn.linear_decay(3, 0.0)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_gate_of_one_is_the_branch_and_of_zero_has_no_gradient(mode):
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
    apply = lambda w, p: nn.stochastic_depth(KEY, lambda x: jnp.tanh(x @ w), x, p, mode=mode)
    assert jnp.array_equal(apply(w, 1.0), jnp.tanh(x @ w))
    assert not np.any(apply(w, 0.0))
    assert not np.any(jax.grad(lambda w: apply(w, 0.0).sum())(w))


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("scale", ["test", "train"])
def test_the_mean_over_gates_is_the_prediction(mode, scale):
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    run = lambda key: nn.stochastic_depth(key, lambda x: 2 * x, x, 0.7, mode=mode, scale=scale)
    draws = jax.jit(jax.vmap(run))(jax.random.split(KEY, 20_000))
    error = np.asarray(draws.mean(0) - run(None))
    assert np.all(np.abs(error) < 4 * np.asarray(draws.std(0)) / np.sqrt(20_000))
    kept = np.asarray(draws != 0)
    if mode == "batch":
        assert np.all(kept.reshape(20_000, -1).all(1) | ~kept.reshape(20_000, -1).any(1))
    else:
        assert np.all(kept.all(2) == kept.any(2)) and not np.all(
            kept.all((1, 2)) == kept.any((1, 2))
        )
        rows = kept[:, :, 0].astype(float)
        assert np.abs(np.corrcoef(rows.T) - np.eye(4)).max() < 0.04
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.02)


def test_folding_gives_the_same_prediction():
    x, w = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 3), (3, 3)))
    b = jnp.ones(3)
    scaled = nn.stochastic_depth(None, lambda x: jnp.tanh(x) @ w + b, x, 0.6)
    kernel, bias = nn.fold_depth(w, b, 0.6)
    np.testing.assert_allclose(jnp.tanh(x) @ kernel + bias, scaled, atol=1e-6)


def test_bad_gates():
    x = jnp.ones((2, 2))
    for options in ({"survival": 1.5}, {"survival": 0.0, "scale": "train"}):
        with pytest.raises(ValueError, match="a probability was due"):
            nn.stochastic_depth(KEY, lambda x: x, x, **options)
    with pytest.raises(ValueError, match="mode='rows'"):
        nn.stochastic_depth(KEY, lambda x: x, x, 0.5, mode="rows")
    with pytest.raises(TypeError, match="typed key"):
        nn.stochastic_depth(jax.random.PRNGKey(0), lambda x: x, x, 0.5)


def test_one_ghost_is_flax_batch_norm():
    x = jnp.asarray(RNG.normal(size=(8, 5, 3)) * 3 + 1, jnp.float32)
    norm = linen.BatchNorm(use_running_average=False, momentum=0.9, use_bias=False, use_scale=False)
    variables = norm.init(KEY, x)
    want, updated = norm.apply(variables, x, mutable=["batch_stats"])
    got, stats = nn.ghost_batch_norm(x, size=8)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(stats.mean, updated["batch_stats"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(stats.var, updated["batch_stats"]["var"], rtol=1e-5)


def test_ghosts_do_not_see_each_other_and_running_statistics_have_their_closed_form():
    x = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
    start = nn.GhostStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0]))
    got, stats = nn.ghost_batch_norm(x, start, size=4, momentum=0.8)
    alone = jnp.concatenate([nn.ghost_batch_norm(x[i : i + 4], size=4)[0] for i in (0, 4, 8)])
    np.testing.assert_allclose(got, alone, atol=1e-6)
    first = jax.jacobian(lambda x: nn.ghost_batch_norm(x, size=4)[0][:4].sum())(x)
    assert not np.any(first[4:])
    g = x.reshape(3, 4, 3)
    for running, new, old in zip(stats, (g.mean(1), g.var(1)), start, strict=True):
        want = 0.8**3 * old + 0.2 * sum(0.8 ** (2 - i) * new[i] for i in range(3))
        np.testing.assert_allclose(running, want, rtol=1e-5)
    low, _ = nn.ghost_batch_norm(x.astype(jnp.bfloat16), size=4)
    assert low.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="a batch of 12 is not a number of ghosts of 5"):
        nn.ghost_batch_norm(x, size=5)


def test_dropout_before_a_linear_head_is_a_ridge():
    """E |mask(X) w - y|^2 / n = |X w - y|^2 / n + p / (1 - p) sum_j w_j^2 mean(x_j^2)."""
    x, w, y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 6), 6, 30))
    p = 0.9
    drop = linen.Dropout(p, deterministic=False)
    loss = lambda key: jnp.mean((drop.apply({}, x, rngs={"dropout": key}) @ w - y) ** 2)
    draws = jax.jit(jax.vmap(loss))(jax.random.split(KEY, 100_000))
    want = jnp.mean((x @ w - y) ** 2) + p / (1 - p) * jnp.sum(w**2 * jnp.mean(x**2, 0))
    assert abs(float(draws.mean() - want)) < 4 * float(draws.std()) / np.sqrt(100_000)


def test_very_large_dropout_uses_redundant_features():
    """Eight blocks of features of falling strength; the two strongest say nothing at test time."""
    p_of = jnp.array([0.0, 0.5, 0.9, 0.99])
    strength = jnp.repeat(3 / (1 + jnp.arange(8.0)), 8)

    def one(key):
        keys = jax.random.split(key, 5)
        signs = jnp.sign(jax.random.normal(keys[0], (64,)))

        def draw(k, n, silent):
            y = jnp.sign(jax.random.normal(jax.random.fold_in(k, 0), (n,)))
            noise = 2 * jax.random.normal(jax.random.fold_in(k, 1), (n, 64))
            shown = strength * jnp.where(jnp.arange(64) < silent, 0, 1)
            return y[:, None] * signs * shown + noise, y

        x, y = draw(keys[1], 200, 0)
        held, labels = draw(keys[2], 1000, 16)
        second = x.T @ x / 200

        def right(p):
            ridge = second + p / (1 - p) * jnp.diag(jnp.diag(second))
            w = jnp.linalg.solve(ridge, x.T @ y / 200)
            return jnp.mean(jnp.sign(held @ w) == labels)

        return jax.vmap(right)(p_of)

    accuracy = jax.jit(jax.vmap(one))(jax.random.split(KEY, 20)).mean(0)
    assert accuracy[2] > accuracy[0] + 0.05 and np.all(np.diff(accuracy) > -0.01), accuracy
