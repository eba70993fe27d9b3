"""Schedules: closed forms, limits, and the refinement on the problem it is optimal for."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.ndimage import median_filter

from jaxkit import optim

STEPS = np.arange(0, 101)


def values(schedule, steps=STEPS):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)))


def test_uba_is_the_cosine_with_its_odds_multiplied():
    cosine = values(optax.cosine_decay_schedule(1.0, 100))
    np.testing.assert_allclose(values(optim.uba(1.0, 100, phi=2.0)), cosine, atol=1e-6)
    inner = slice(1, 100)
    curves = []
    for phi in (0.3, 1.0, 2.0, 7.0):
        y = values(optim.uba(1.0, 100, phi=phi))
        np.testing.assert_allclose(y[[0, -1]], [1, 0], atol=1e-6)
        assert np.all(np.diff(y) < 1e-7)
        np.testing.assert_allclose(y[50], 2 / (2 + phi), rtol=1e-5)
        got, want = y[5:95] / (1 - y[5:95]), 2 / phi * cosine[5:95] / (1 - cosine[5:95])
        np.testing.assert_allclose(got, want, rtol=2e-4)
        curves.append(y[inner])
    assert all(np.all(a > b) for a, b in pairwise(curves))
    shifted = values(optim.uba(3.0, 100, phi=2.0, floor=1.0, warmup=20, start=0.5))
    np.testing.assert_allclose(shifted[[0, 10, 20, 60, 100]], [0.5, 1.75, 3, 2, 1], atol=1e-6)
    np.testing.assert_allclose(values(optim.uba(1.0, 10), [10, 11, 99]), 0, atol=1e-7)
    with pytest.raises(ValueError, match="phi=0"):
        optim.uba(1.0, 10, phi=0)
    with pytest.raises(ValueError, match="warmup=10"):
        optim.uba(1.0, 10, warmup=10)


def test_cosine_power_has_its_limit_and_its_middle_and_is_near_the_table_of_the_code():
    cosine = values(optax.cosine_decay_schedule(1.0, 100))
    np.testing.assert_allclose(values(optim.cosine_power(1.0, 100, power=1.001)), cosine, atol=1e-3)
    np.testing.assert_allclose(values(optim.cosine_power(1.0, 100, power=1)), cosine, atol=1e-6)
    for p in (2.0, 10.0):
        y = values(optim.cosine_power(1.0, 100, power=p))
        np.testing.assert_allclose(y[50], 1 / (1 + np.sqrt(p)), rtol=1e-5)
        np.testing.assert_allclose(y[[0, -1]], [1, 0], atol=1e-6)
        assert np.all(np.diff(y) < 0)
    epoch = np.arange(1, 101)
    table = 10.0 ** ((1 + np.cos(np.pi * epoch / 100)) / 2 + 1)
    table = (table - table.min()) / (table.max() - table.min())
    y = values(optim.cosine_power(1.0, 100, power=10.0), epoch)
    assert np.abs(y - table).max() < 7e-4
    with pytest.raises(ValueError, match=r"power=0\.5"):
        optim.cosine_power(1.0, 100, power=0.5)


def test_odds():
    x = np.linspace(0.1, 0.9, 9)
    y = np.asarray(optim.odds(jnp.asarray(x), 3.0))
    np.testing.assert_allclose(y / (1 - y), 3 * x / (1 - x), rtol=1e-5)


def test_rewarm_starts_where_the_run_ended():
    y = values(optim.rewarm(2.0, 100, start=0.2, warmup=0.1))
    np.testing.assert_allclose(y[[0, 5, 10, 100]], [0.2, 1.1, 2.0, 0.2], rtol=1e-6)
    assert values(optim.rewarm(2.0, 100, warmup=0.0))[0] == 2.0


def test_constant_norms_are_refined_to_linear_decay():
    table = values(optim.refined(np.full(41, 3.0)), np.arange(41))
    np.testing.assert_allclose(table, np.linspace(1, 0, 41), atol=1e-6)


def test_refinement_by_hand_and_what_it_does_to_falling_and_rising_norms():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=60).cumsum() / 5)
    width = 2 * int(0.1 * 60 / 2) + 1
    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    g = median_filter(padded, size=width, mode="nearest")[:60]
    for norm, w in (("l2", g**-2), ("l1", 1 / g)):
        want = np.array([w[t] * w[t + 1 :].sum() for t in range(60)])
        got = values(optim.refined(norms, 0.3, norm=norm), np.arange(60))
        np.testing.assert_allclose(got, 0.3 * want / want.max(), rtol=1e-4, atol=1e-7)
        scaled = values(optim.refined(70 * norms, 0.3, norm=norm), np.arange(60))
        np.testing.assert_allclose(scaled, got, rtol=1e-4, atol=1e-7)
        assert got[-1] == 0 and np.all(got >= 0)
    t = np.arange(100)
    falling = values(optim.refined(1 + 9 * np.exp(-t / 10)), t)
    assert falling.argmax() > 3  # warmup
    rising = values(optim.refined(1 + np.maximum(0, t - 60) / 10), t)
    assert np.all(rising[61:99] < 1 - t[61:99] / 99)
    longer = values(optim.refined(np.ones(11), steps=101), np.arange(101))
    np.testing.assert_allclose(longer, np.linspace(1, 0, 101), atol=1e-6)
    for bad in ([1.0], [1.0, np.nan], [1.0, -1.0], [0.0, 0.0], np.ones((2, 2))):
        with pytest.raises(ValueError, match="norms of at least two steps"):
            optim.refined(np.array(bad))
    with pytest.raises(ValueError, match="norm='L2'"):
        optim.refined(np.ones(5), norm="L2")
    assert np.all(
        np.isfinite(values(optim.refined(np.array([1.0, 0.0, 2.0]), smooth=0), [0, 1, 2]))
    )


def test_linear_decay_has_the_best_last_iterate_on_a_noisy_kink():
    """E |x_T| of the subgradient method on |x|, noise of standard deviation 2, T = 400."""

    def last(schedule):
        def step(x, inputs):
            t, noise = inputs
            return x - 0.02 * schedule(t) * (jnp.sign(x) + 2 * noise), None

        def run(key):
            noise = jax.random.normal(key, (400,))
            return jnp.abs(jax.lax.scan(step, 1.0, (jnp.arange(400), noise))[0])

        return float(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4000)).mean())

    linear, constant = last(optax.linear_schedule(1.0, 0.0, 400)), last(lambda t: 1.0)
    assert linear < constant / 10
