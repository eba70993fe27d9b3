"""Time-to-result scores: the closed form against the integral, and its known properties."""

import numpy as np
import pytest

from jaxkit import optim


def test_the_score_is_the_integral_of_the_profile():
    ratios = np.array([1, 1.3, 2, 5, np.inf, 1, 3.9, 1])
    best = np.array([3.0, 7, 1, 2, 9, 4, 5, 6])
    times = np.stack([best * ratios, best])
    found = optim.algoperf(times)
    np.testing.assert_allclose(found.score, [0.575, 1.0], rtol=1e-12)
    np.testing.assert_allclose(found.ratio[0], ratios)
    tau = np.linspace(1, 4, 300_001)
    np.testing.assert_allclose(np.mean(found.profile(tau)[0]), 0.575, atol=1e-5)
    np.testing.assert_allclose(optim.algoperf(times * best).score, found.score)
    third = optim.algoperf(np.concatenate([times, best[None] / 2]))
    assert np.all(third.score[:2] < found.score)


def test_never_and_nobody():
    found = optim.algoperf([[np.inf, 5.0], [np.inf, np.inf]])
    assert found.score.tolist() == [0.5, 0.0] and np.isinf(found.ratio[:, 0]).all()
    assert optim.algoperf([[0.0, 1.0], [1.0, 1.0]]).score.tolist() == [1.0, 0.5]


def test_bad_input():
    for bad in ([[1.0, np.nan]], [[1.0, -1.0]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="times are due"):
            optim.algoperf(bad)
    with pytest.raises(ValueError, match="tau_max=1"):
        optim.algoperf([[1.0]], tau_max=1)


def test_reached_and_joint_calibration():
    steps, metric = [10, 20, 30, 40], [0.1, np.nan, 0.6, 0.9]
    assert optim.reached(steps, metric, 0.5, maximize=True) == 30
    assert optim.reached(steps, metric, 0.05, maximize=False) == np.inf
    assert optim.reached(steps, metric, 0.1, maximize=False) == 10
    with pytest.raises(ValueError, match=r"\(4,\) steps and \(3,\) values"):
        optim.reached(steps, metric[:3], 0.5, maximize=True)
    rng = np.random.default_rng(0)
    times = rng.uniform(5, 9, (6, 4))
    times[4] = 5.0  # never the best by much, good everywhere
    times[:4] += 20 * np.eye(4)
    assert optim.calibrate_jointly(times) == 4
    assert optim.algoperf(times).score.max() == optim.algoperf(times).score[4]
