from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import three_regimes
from tests.runs import all_rows

SMALL = replace(
    three_regimes.Settings(), train=128, test=50, seeds=2, hidden=(16, 12), dense_steps=(5, 60),
    densities=(0.1, 1.0), steps=40, batch=32, points=5, lr=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return all_rows(three_regimes.run(SMALL, None))


def test_the_grid_is_whole(small):
    found = three_regimes.grid(small)
    assert found.dense_steps.tolist() == [5, 60] and found.density.tolist() == [0.1, 1.0]
    for values in found[2:]:
        assert values.shape == (2, 2, 2) and np.isfinite(values).all()
    assert ((found.test >= 0) & (found.test <= 1)).all()
    assert ((found.cka > 0) & (found.cka <= 1.0001)).all()


def test_more_training_and_more_weights_fit_better(small):
    error = {(row["dense_steps"], row["density"]): np.mean(row["train"]) for row in small}
    assert error[60, 1.0] < error[5, 1.0] and error[60, 1.0] < error[60, 0.1]
    assert error[60, 1.0] < 0.05
    before = {row["dense_steps"]: np.mean(row["before"]) for row in small}
    assert before[60] < before[5]


def test_different_dense_networks_lie_behind_a_barrier(small):
    found = three_regimes.grid(small)
    assert found.lmc_others[-1, -1].max() < -0.1 < found.lmc[-1, -1].min()


def made_up(effect, lmc, cka):
    """Rows in which a hot training costs `effect`, with measures by density."""
    return [
        {"dense_steps": steps, "density": density, "test": [0.3 + hot * e, 0.3 + hot * e + 0.001]}
        | {"lmc": [m, m], "cka": [c, c], "lmc_others": [-0.3, -0.2]}
        for steps, hot in ((25, 1), (800, 0))
        for density, e, m, c in zip((0.03, 0.5), effect, lmc, cka, strict=True)
    ]


def test_claims_and_figure_of_made_up_rows():
    settings = replace(three_regimes.Settings(), seeds=2)
    regimes = made_up((-0.1, 0.1), (-0.2, 0.0), (0.7, 0.9))
    claims = three_regimes.claims(settings, regimes)
    assert [claim.holds for claim in claims] == [True, True, True, True]
    assert "-10.0 ± 0.0 at 3.0%, +10.0 ± 0.0 at 50.0%" in claims[0].measured
    assert "the best of the trainings had 25, 800 steps" in claims[0].measured
    one = made_up((0.2, 0.1), (-0.001, 0.0), (0.9, 0.8))
    claims = three_regimes.claims(settings, one)
    assert [claim.holds for claim in claims] == [False, False, False, True]
    for rows in (regimes, one):
        assert isinstance(three_regimes.plot(settings, rows), Figure)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"batch": 129}, "batch=129 is more than train=128"),
        ({"dense_steps": (60, 5)}, r"dense_steps=\(60, 5\): steps in rising order"),
        ({"densities": (0.5, 0.1)}, "densities in rising order were due"),
        ({"densities": (0.0, 0.1)}, r"numbers in \(0, 1\] were due"),
    ):
        with pytest.raises(ValueError, match=match):
            three_regimes.run(replace(SMALL, **change), None)
