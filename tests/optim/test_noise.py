"""Noise on gradients: its law, its place in the chain, that of a smaller batch, and its scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import optim

KEY = jax.random.key(0)


def draws(tx, grads, steps=3):
    """Return the updates of the first steps."""

    def step(state, _):
        updates, state = tx.update(grads, state)
        return state, updates

    return jax.jit(lambda: jax.lax.scan(step, tx.init(grads), None, length=steps)[1])()


def test_variance_is_annealed_and_leaves_and_steps_are_independent():
    grads = {"a": jnp.zeros((400, 250)), "b": jnp.ones((400, 250))}
    noise = draws(optim.gradient_noise(0.3, key=KEY), grads)
    want = np.sqrt(0.3 / (1 + np.arange(3)) ** 0.55)
    np.testing.assert_allclose(want, [0.5477, 0.4527, 0.4049], atol=1e-4)
    for name, mean in (("a", 0), ("b", 1)):
        np.testing.assert_allclose(noise[name].std((1, 2)), want, rtol=0.01)
        assert np.all(np.abs(noise[name].mean((1, 2)) - mean) < 5 * want / np.sqrt(1e5))
    flat = jnp.concatenate([noise["a"].reshape(3, -1), noise["b"].reshape(3, -1)])
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.02
    constant = draws(optim.gradient_noise(0.04, key=KEY, decay=0.0), grads)
    np.testing.assert_allclose(constant["a"].std((1, 2)), 0.2, rtol=0.01)
    none = draws(optim.gradient_noise(0.0, key=KEY), grads)
    assert jnp.all(none["b"] == 1)


def test_a_key_gives_its_trajectory_whatever_other_leaves_there_are():
    grads = {"a": jnp.zeros(5), "n": jnp.arange(3)}
    first = draws(optim.gradient_noise(1.0, key=KEY), grads)
    again = draws(optim.gradient_noise(1.0, key=KEY), {**grads, "b": jnp.zeros(9)})
    other = draws(optim.gradient_noise(1.0, key=jax.random.key(1)), grads)
    assert jnp.array_equal(first["a"], again["a"]) and not jnp.any(first["a"] == other["a"])
    assert jnp.array_equal(first["n"][2], grads["n"])


def test_the_law_is_that_of_optax_but_in_bfloat16():
    """optax draws in the dtype of the leaf: 128 numbers, and a mean that is not 0."""
    ours, theirs = optim.gradient_noise(0.3, key=KEY), optax.add_noise(0.3, 0.55, KEY)
    for dtype in (jnp.float32, jnp.bfloat16):
        grads = jnp.zeros(500_000, dtype)
        a, b = (np.asarray(draws(tx, grads), np.float64) for tx in (ours, theirs))
        std = np.sqrt(0.3 / (1 + np.arange(3)) ** 0.55)
        bound = 5 * std / np.sqrt(500_000)
        np.testing.assert_allclose(a.std(1), std, rtol=0.01)
        np.testing.assert_allclose(b.std(1), std, rtol=0.01)
        assert np.all(np.abs(a.mean(1)) < bound) and np.all(np.abs(a).max(1) > 4 * std)
        fine = dtype == jnp.float32
        assert np.all((np.abs(b.mean(1)) < bound) == fine)
        assert np.all((np.abs(b).max(1) > 4 * std) == fine)


def test_its_place_in_the_chain_is_its_meaning():
    """Before the rate the noise is multiplied by it; before clipping it is clipped along."""
    rate, grads = 0.1, jnp.zeros(100_000).at[0].set(1e3)
    noise = optim.gradient_noise(0.3, key=KEY)
    clip, scale = optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(rate)
    std = lambda *links: float(draws(optax.chain(*links), grads, 1)[0][1:].std())
    np.testing.assert_allclose(std(clip, noise, scale), rate * np.sqrt(0.3), rtol=0.02)
    np.testing.assert_allclose(std(clip, scale, noise), np.sqrt(0.3), rtol=0.02)
    # the norm of gradient and noise is about sqrt(1e6 + 1e5 * 0.3)
    want = rate * np.sqrt(0.3) / np.sqrt(1e6 + 3e4)
    np.testing.assert_allclose(std(noise, clip, scale), want, rtol=0.02)


def test_keys_of_their_own_average_the_noise_away():
    one = lambda key: draws(optim.gradient_noise(1.0, key=key), jnp.zeros(20_000), 1)[0]
    mean = jax.vmap(one)(jax.random.split(KEY, 8)).mean(0)
    np.testing.assert_allclose(mean.std(), 1 / np.sqrt(8), rtol=0.03)


def test_bad_input():
    with pytest.raises(ValueError, match=r"variance=-0\.1"):
        optim.gradient_noise(-0.1, key=KEY)
    with pytest.raises(TypeError, match="typed key"):
        optim.gradient_noise(0.1, key=jax.random.PRNGKey(0))
    for small in (0, 65):
        with pytest.raises(ValueError, match=f"small={small}"):
            optim.weight_noise(KEY, 64, small=small)
    with pytest.raises(TypeError, match="typed key"):
        optim.weight_noise(jax.random.PRNGKey(0), 64, small=8)
    with pytest.raises(ValueError, match="small_batch=8 and large_batch=8"):
        optim.gradient_noise_scale(1.0, 1.0, small_batch=8, large_batch=8)


@pytest.mark.parametrize("moments", ["keep", "reset", "pullback"])
def test_keys_in_the_state_of_an_optimizer_pass_through_lookahead(moments):
    """(optax.lookahead with reset_state selects by arithmetic, which typed keys do not have.)"""
    noise = optim.gradient_noise(1.0, key=KEY)
    tx = optim.lookahead(optax.chain(noise, optax.sgd(0.1)), every=3, moments=moments)
    zeros = jnp.zeros(50)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    path = jax.jit(lambda: jax.lax.scan(step, (zeros, tx.init(zeros)), None, length=6)[1])()
    drawn = draws(noise, zeros, 6)
    np.testing.assert_allclose(path[2], -0.05 * drawn[:3].sum(0), atol=1e-6)
    # a state that is reset begins its noise anew
    second = drawn[:3] if moments == "reset" else drawn[3:]
    np.testing.assert_allclose(path[5] - path[2], -0.05 * second.sum(0), atol=1e-6)


# --------------------------------------------------------------------------- of a smaller batch


def examples(key, n, mean):
    """Gradients of n examples: a mean, and a covariance that is not diagonal."""
    root = jnp.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, -1.0, 1.5]])
    return mean + jax.random.normal(key, (n, 3)) @ root.T


def test_weights_give_a_large_batch_the_noise_of_a_small_one():
    large, small, n = 64, 4, 40_000
    mean = jnp.array([0.3, -0.2, 0.1])

    def one(key):
        own, z = jax.random.split(key)
        g = examples(own, large, mean)
        weights = optim.weight_noise(z, large, small=small)
        return g[:small].mean(0), weights @ g / large, g.mean(0), weights

    keys = jax.random.split(KEY, n)
    few, weighted, plain, weights = jax.jit(jax.vmap(one))(keys)
    np.testing.assert_allclose(weights.mean(), 1, atol=0.01)
    np.testing.assert_allclose(weights.var(), large / small - 1, rtol=0.01)
    np.testing.assert_allclose(weighted.mean(0), mean, atol=5 * 1.2 / np.sqrt(n))
    root = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, -1.0, 1.5]])
    second = root @ root.T + np.outer(mean, mean)
    want = second / small - np.outer(mean, mean) / large
    np.testing.assert_allclose(np.cov(weighted.T), want, atol=0.03)
    np.testing.assert_allclose(np.cov(few.T), root @ root.T / small, atol=0.03)
    assert np.trace(np.cov(plain.T)) < np.trace(want) / 12
    same = optim.weight_noise(KEY, 8, small=8)
    assert same.tolist() == [1.0] * 8


def test_the_noise_scale_is_that_of_the_examples():
    mean, n = jnp.array([0.3, -0.2, 0.4]), 40_000
    norm = lambda key, batch: jnp.sum(examples(key, batch, mean).mean(0) ** 2)

    def one(key):
        g = examples(key, 32, mean)
        return jnp.sum(g[:8].mean(0) ** 2), jnp.sum(g.mean(0) ** 2)

    small, large = jax.jit(jax.vmap(one))(jax.random.split(KEY, n))
    found = optim.gradient_noise_scale(small, large, small_batch=8, large_batch=32)
    trace = 4 + 1.25 + 3.25
    for got, want in ((found.signal, 0.29), (found.noise, trace)):
        assert abs(got.mean() - want) < 4 * got.std() / np.sqrt(n)
    average = optim.NoiseScale(found.signal.mean(), found.noise.mean())
    np.testing.assert_allclose(average.scale, trace / 0.29, rtol=0.05)
    # it predicts the norm at another batch size
    third = jax.jit(jax.vmap(lambda k: norm(k, 16)))(jax.random.split(jax.random.key(1), n))
    np.testing.assert_allclose(third.mean(), average.signal + average.noise / 16, rtol=0.02)


def test_norms_of_noise_are_comparable_after_multiplying_by_the_root_of_the_batch():
    """What `successive_keep` asks of runs with other batch sizes, where noise is most of it."""
    sizes = [4, 16, 64]
    norms = [
        jax.jit(jax.vmap(lambda k, b=b: jnp.linalg.norm(examples(k, b, 0.0).mean(0))))(
            jax.random.split(KEY, 4000)
        ).mean()
        for b in sizes
    ]
    assert norms[0] > 3 * norms[2]
    np.testing.assert_allclose(np.sqrt(sizes) * norms / (2 * norms[0]), 1, rtol=0.05)
