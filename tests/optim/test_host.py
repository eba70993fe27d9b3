"""AutoLRS and triage: forecasts that are known, planted choices, orders of data."""

import itertools

import jax
import numpy as np
import pytest

from jaxkit import optim

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def test_forecasts_of_exponentials():
    x = np.arange(100)
    curve = 2 * np.exp(-0.01 * x) + 0.5
    want = 2 * np.exp(-10) + 0.5
    np.testing.assert_allclose(optim.forecast(curve, 1000), want, atol=1e-4)
    noisy = [optim.forecast(curve * (1 + 0.003 * RNG.normal(size=100)), 150) for _ in range(5)]
    np.testing.assert_allclose(np.median(noisy), 2 * np.exp(-1.5) + 0.5, rtol=0.05)
    spiked = curve.copy()
    spiked[[3, 17, 30]] += 5
    np.testing.assert_allclose(optim.forecast(spiked, 200), 2 * np.exp(-2) + 0.5, rtol=0.05)
    coarse = 2 * np.exp(-0.01 * 5 * x[:40]) + 0.5
    np.testing.assert_allclose(optim.forecast(coarse, 1000, spacing=5), want, atol=1e-4)
    assert optim.forecast(np.full(9, 3.0), 50, validation=True) == 3.0
    assert optim.forecast(np.linspace(1, 2, 16), 160, validation=True) == 2.0
    np.testing.assert_allclose(optim.forecast(curve, 1000, validation=True), want, atol=1e-4)
    assert optim.forecast(np.array([1, np.nan, 1, 1, 1]), 50) == np.inf
    with pytest.raises(ValueError, match="at least 4 losses"):
        optim.forecast(curve[:3], 50)


def test_a_loss_that_rises_is_said_to_and_noise_is_not():
    x = np.arange(100)
    for rising in (np.linspace(1, 2, 16), 3 - 2 * np.exp(-0.01 * x) + 0.003 * RNG.normal(size=100)):
        with pytest.warns(UserWarning, match="the loss rises"):
            optim.forecast(rising, 160)
    for level in (np.full(40, 3.0), *(3 + 0.1 * RNG.normal(size=(5, 40)))):
        optim.forecast(level, 160)


def test_a_stage_of_which_every_candidate_diverges_is_not_trained():
    calls = []

    def train(state, rate, n):
        calls.append(n)
        return state, np.full(n, np.nan if state else 1.0)

    stages = optim.autolrs(train, 0, low=1e-4, high=1.0, steps=60, trial_steps=6, candidates=3)
    assert next(stages).search_steps == 18
    stages = optim.autolrs(train, 1, low=1e-4, high=1.0, steps=60, trial_steps=6, candidates=3)
    calls.clear()
    with pytest.raises(ValueError, match=r"every rate that was tried in \[0.0001, 1.0\] diverged"):
        next(stages)
    assert calls == [6] * 3


def test_autolrs_finds_a_good_rate_and_counts_its_cost():
    """A parabola in two directions: large rates diverge, small ones are slow."""
    curvature = np.array([1.0, 30.0])
    calls = []

    def train(state, rate, n):
        calls.append(n)
        w, losses = np.array(state), []
        for _ in range(n):
            losses.append(0.5 * np.sum(curvature * w**2))
            w = w - rate * curvature * w if losses[-1] < 1e6 else w
        return w, np.array(losses)

    start = np.array([5.0, 1.0])
    stages = optim.autolrs(train, start, low=1e-4, high=1.0, steps=60, trial_steps=12, most=120)
    first, second = itertools.islice(stages, 2)
    assert calls == [12] * 10 + [60] + [12] * 10 + [120]  # trials are a tenth of 120 at most
    assert first.search_steps == 120
    grid = np.geomspace(1e-4, 1.0, 200)
    end = [train(start, r, 60)[1][-1] for r in grid]
    best = grid[int(np.argmin(end))]
    assert best / 2 < first.rate < 2 * best, (first.rate, best)
    again, _ = train(start, first.rate, 60)
    np.testing.assert_array_equal(again, first.state)
    assert len(second.losses) == 120 and len(second.tried) == 10
    with pytest.raises(ValueError, match="0 < low < high"):
        optim.autolrs(train, start, low=1.0, high=0.1)


def test_triage_keeps_the_planted_runs_whatever_the_units():
    losses = 1 + RNG.random((8, 20)) * 0.01
    norms = np.exp(RNG.normal(size=(8, 20)) * 0.01)
    losses[[1, 4, 6, 7]] += 1
    norms[[1, 4, 6, 7]] /= 3
    want = np.isin(np.arange(8), [1, 4, 6, 7])
    for a, b, c in ((1, 0, 1), (5, -2, 40)):
        np.testing.assert_array_equal(optim.successive_keep(a * losses + b, c * norms), want)
    tie = optim.successive_keep(np.ones((3, 2)), np.array([[2.0, 2], [1, 1], [2, 2]]), share=0.3)
    assert tie.tolist() == [False, True, False]
    for bad in ((losses, norms[:3]), (losses * np.nan, norms), (losses, 0 * norms)):
        with pytest.raises(ValueError, match="finite losses"):
            optim.successive_keep(*bad)
    for share in (0, 2, np.nan):
        with pytest.raises(ValueError, match="share="):
            optim.successive_keep(losses, norms, share=share)
    many = RNG.random((100, 2)), 1 + RNG.random((100, 2))
    assert optim.successive_keep(*many, share=0.07).sum() == 7
    spoiled = losses.copy()
    spoiled[[4, 5], 3] = np.nan, np.inf
    kept = optim.successive_keep(spoiled, norms)
    assert np.all(kept[[1, 6, 7]]) and kept.sum() == 4 and not np.any(kept[[4, 5]])


def test_orders_of_data():
    sizes = [5, 0, 9]
    every = {(d, i) for d, n in enumerate(sizes) for i in range(n)}
    for order in (optim.stacked(KEY, sizes), optim.phased(KEY, sizes)):
        assert len(order) == 14 and {(int(d), int(i)) for d, i in order} == every
    assert np.all(np.diff(optim.phased(KEY, sizes)[:, 0]) >= 0)
    assert not np.all(np.diff(optim.stacked(KEY, sizes)[:, 0]) >= 0)
