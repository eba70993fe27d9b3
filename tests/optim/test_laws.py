"""Laws: published numbers, exact recovery, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import optim

# steps to the target loss at batch sizes 64 ... 16384, as published with the paper
BATCHES = 64 * 2.0 ** np.arange(9)
STEPS = {
    85e6: [46000, 23000, 13282, 7000, 3840, 2500, 1800, 1600, 1600],
    151e6: [96000, 49000, 24000, 11951, 7128, 4200, 2760, 2400, 2300],
    302e6: [196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879],
    604e6: [311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800],
    1.2e9: [643000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500],
}


def test_critical_batch_sizes_of_the_published_runs():
    found = [
        optim.critical_batch(BATCHES, np.array(steps), optimal=256).critical
        for steps in STEPS.values()
    ]
    np.testing.assert_allclose(found, [754, 968, 1394, 1889, 2535], rtol=2e-3)
    law = optim.fit_power_law(np.array(found), np.array([*STEPS]) / 1e6)
    np.testing.assert_allclose([law.scale, law.exponents[0]], [96.6, 0.463], rtol=0.01)
    # against the data that they saw, in millions of tokens: the steps at a batch of 256 times 512
    tokens = np.array([13282, 23438, 46875, 93750, 187500]) * 256 * 512 / 1e6
    law = optim.fit_power_law(np.array(found), tokens)
    np.testing.assert_allclose([law.scale, law.exponents[0]], [23.9, 0.463], rtol=2e-3)


def test_critical_batch_recovers_its_law_and_says_where_it_is_none():
    law = optim.critical_batch(BATCHES, 300 + 4e6 / BATCHES, optimal=256)
    np.testing.assert_allclose([law.floor, law.slope], [300, 4e6], rtol=1e-6)
    y = lambda b: law.floor + law.slope / b
    np.testing.assert_allclose(y(law.critical) * law.critical, 1.2 * y(256) * 256, rtol=1e-6)
    assert not law.extrapolated
    assert optim.critical_batch(BATCHES[:3], 3 + 4e6 / BATCHES[:3], optimal=256).extrapolated
    some = np.where(BATCHES < 100, np.inf, 300 + 4e6 / BATCHES)
    with pytest.warns(UserWarning, match="not reached at batch size 64: left out"):
        less = optim.critical_batch(BATCHES, some, optimal=256)
    np.testing.assert_allclose(less.critical, law.critical, rtol=1e-5)
    with pytest.raises(ValueError, match="larger batches"):
        optim.critical_batch(BATCHES, 4e6 / BATCHES, optimal=256)
    with pytest.raises(ValueError, match="at least 3"):
        optim.critical_batch(BATCHES[:2], 1 / BATCHES[:2], optimal=256)


def test_step_law_and_its_fit():
    rate, batch = optim.step_law(1e9, 1e11)
    np.testing.assert_allclose([rate, batch], [1.632e-3, 1.1077e6], rtol=1e-3)
    assert np.isclose(optim.step_law(1e9 / 2 ** (1 / 0.713), 1e11)[0], 2 * rate)
    for n, d in ((7e9, 1e11), (1e9, 100.0)):
        with pytest.warns(UserWarning, match="are these numbers, not millions or billions"):
            optim.step_law(n, d)
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7.8, 9, 40), 10 ** rng.uniform(9.4, 11, 40)
    law = optim.fit_power_law(optim.step_law(n, d)[0], n, d)
    np.testing.assert_allclose([law.scale, *law.exponents], [1.79, -0.713, 0.307], rtol=1e-8)
    noisy = optim.step_law(n, d)[0] * np.exp(0.05 * rng.normal(size=40))
    law = optim.fit_power_law(noisy, n, d, resamples=200)
    np.testing.assert_allclose(law.exponents, [-0.713, 0.307], atol=0.04)
    np.testing.assert_allclose(
        law(1e8, 1e10), law.scale * 1e8 ** law.exponents[0] * 1e10 ** law.exponents[1]
    )
    with pytest.raises(ValueError, match="positive numbers"):
        optim.fit_power_law(np.array([1.0, 0.0]), np.array([1.0, 2.0]))
    marked = optim.near_best(np.array([1.0, 1.0024, 1.0026, 5.0]), np.array([7, 7, 7, 8]))
    assert marked.tolist() == [True, True, False, True]
    diverged = np.array([1.0, 1.001, np.nan, 2.0, np.inf, np.nan])
    marked = optim.near_best(diverged, np.array([0, 0, 0, 1, 1, 2]))
    assert marked.tolist() == [True, True, False, True, False, False]


def test_half_lives():
    assert np.isclose(optim.half_life(0.9), np.log(0.5) / np.log(0.9))
    for half, step in ((100.0, 7.0), (1e6, 512.0)):
        assert np.isclose(optim.half_life(optim.decay_from_half_life(half, step), step), half)
    new = optim.rescale_decay(0.95, 512, 1)
    assert np.isclose(new, 0.9998998, atol=5e-8) and np.isclose(new**512, 0.95)
    with pytest.raises(ValueError, match="is 1 in float32"):
        optim.rescale_decay(0.9999, 10_000, 1)
    for half in (1e10, np.float64(1e10), jnp.float32(1e10)):
        with pytest.raises(ValueError, match="is 1 in float32"):
            optim.decay_from_half_life(half, 1.0)
    assert jax.jit(lambda h: optim.decay_from_half_life(h, 1.0))(1e10) == 1
    with pytest.raises(ValueError, match="decay=1"):
        optim.rescale_decay(1.0, 512, 1)


def test_stochastic_rounding_is_unbiased_and_exact_where_it_can_be():
    x = jnp.asarray(np.random.default_rng(0).normal(size=7), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 200_000)
    draws = jax.jit(jax.vmap(lambda k: optim.stochastic_round(k, x)))(keys).astype(jnp.float32)
    error = np.asarray(draws.mean(0) - x)
    assert np.all(np.abs(error) < 4 * np.asarray(draws.std(0)) / np.sqrt(len(keys)) + 1e-7)
    near = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.all(np.abs(np.asarray(draws) - near) <= np.abs(near) * 2**-7)
    exact = jnp.array([1.0, -0.5, 0.0, jnp.inf, -jnp.inf])
    assert jnp.array_equal(
        optim.stochastic_round(jax.random.key(1), exact), exact.astype(jnp.bfloat16)
    )
    assert jnp.isnan(optim.stochastic_round(jax.random.key(1), jnp.float32(np.nan)))
    mirrored = optim.stochastic_round(jax.random.key(2), -x)
    assert jnp.array_equal(mirrored, -optim.stochastic_round(jax.random.key(2), x))
    # nearest rounding would never leave 1
    w = jnp.ones(1000, jnp.bfloat16)
    for k in jax.random.split(jax.random.key(3), 40):
        w = optim.stochastic_round(k, w.astype(jnp.float32) + 1e-3)
    np.testing.assert_allclose(w.astype(jnp.float32).mean(), 1.04, atol=3e-3)
    with pytest.raises(TypeError, match="bfloat16 was due"):
        optim.stochastic_round(jax.random.key(0), x, jnp.float16)


def test_asymptotes():
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    law = optim.fit_asymptote(x * 1e8, 3.4 + 0.8 / x**0.7)
    np.testing.assert_allclose([law.limit, law.exponent], [3.4, 0.7], rtol=1e-3)
    np.testing.assert_allclose(law(1e8), 4.2, rtol=1e-3)
    np.testing.assert_allclose(law.inverse(law(3e8)), 3e8, rtol=1e-6)
    for bad in (x[:3], np.array([1.0, 2.0, np.nan, 4.0])):
        with pytest.raises(ValueError, match="at least 4 points"):
            optim.fit_asymptote(x[: len(bad)], bad)


def test_mean_logits_are_never_worse_than_the_mean_loss():
    logits = jax.random.normal(jax.random.key(0), (5, 1000, 7)) * 3
    labels = jax.random.randint(jax.random.key(1), (1000,), 0, 7)
    loss = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels)
    assert np.all(loss(logits.mean(0)) <= jax.vmap(loss)(logits).mean(0) + 1e-5)


def test_sensitivity_to_the_learning_rate():
    losses = np.array([[2.0, 2.0, 2.0], [1.0, 2.0, np.inf], [3.0, np.nan, 1.5], [9.0, 1.0, 1.0]])
    np.testing.assert_allclose(
        optim.lr_sensitivity(losses, 3.0), [0, (0 + 1 + 2) / 3, (1.5 + 1.5) / 3, 2 / 3]
    )


def test_independent_weight_decay_does_not_depend_on_the_peak_rate():
    """The chain that Wortsman et al. use: the decay after the rate, with a negative sign."""
    shape = optax.linear_schedule(1.0, 0.5, 10)

    def decayed(peak):
        tx = optax.chain(
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(lambda t: peak * shape(t)),
            optax.add_decayed_weights(lambda t: -1e-2 * shape(t)),
        )
        w, state = jnp.ones(()), tx.init(jnp.ones(()))
        for _ in range(10):
            updates, state = tx.update(jnp.zeros(()), state, w)
            w = optax.apply_updates(w, updates)
        return float(w)

    want = np.prod([1 - 1e-2 * float(shape(t)) for t in range(10)])
    np.testing.assert_allclose([decayed(1e-3), decayed(1e-1)], want, rtol=1e-6)
