from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import schedules
from experiments.schedules import CONSTANT, CONTINUED, COSINE, LINEAR, POWER, REFINED
from tests.runs import all_rows

SMALL = replace(
    schedules.Settings(), train=120, test=60, seeds=2, width=8, budgets=(20,), batch=16,
    sgd=(0.02, 0.1), adam=(4e-3, 2e-2), first=60, second=60, every=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return all_rows(schedules.run(SMALL, None))


def test_rows_of_every_schedule(small):
    names = schedules.names(SMALL)
    assert names == (CONSTANT, LINEAR, COSINE, "UBA 0.5", "UBA 1", POWER, REFINED)
    for workload in schedules.WORKLOADS:
        for name in names:
            row = schedules.own_row(small, workload, 20, name)
            losses = np.array([row["choose"], row["judge"]])
            assert losses.shape == (2, 2, 2) and np.isfinite(losses).all()
            assert row["shape"][-1] == 1.0 if name == CONSTANT else row["shape"][-1] < 0.1
            assert max(row["shape"]) == 1.0
        # one seed and batch: an equal schedule would give an equal loss
        judge = [schedules.own_row(small, workload, 20, name)["judge"][0][0] for name in names]
        assert len(set(judge)) == len(names)
    assert len(small) == 2 * len(names) + len(CONTINUED)


def test_the_shapes_are_those_of_the_papers():
    shape = dict(zip(schedules.names(SMALL), schedules.shapes(SMALL, 100), strict=False))
    np.testing.assert_allclose(shape[LINEAR], 1 - np.arange(100) / 100, rtol=1e-5)
    cosine = (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    np.testing.assert_allclose(shape[COSINE], cosine, atol=1e-6)
    np.testing.assert_allclose(shape[POWER], (10**cosine - 1) / 9, atol=1e-6)
    odds = lambda x: x[1:] / (1 - x[1:])
    for phi in (0.5, 1.0):
        np.testing.assert_allclose(odds(shape[f"UBA {phi:g}"]), 2 / phi * odds(cosine), rtol=1e-3)


def test_new_data_are_learned_at_a_high_rate_and_old_forgotten(small):
    for name in CONTINUED:
        for test in ("upstream", "downstream"):
            assert schedules.course(small, name, test).shape == (4, 2)
    begin = [schedules.course(small, name, "upstream")[0] for name in CONTINUED]
    assert np.ptp(begin, axis=0).max() == 0  # all go on from one network
    end = {name: schedules.course(small, name, "downstream")[-1].mean() for name in CONTINUED}
    assert end["re-warmed, 1% warmup"] < end["re-warmed to a tenth"] < end["constant floor"]


def made_up(better, continued=((2.0, 0.3), (0.2, 1.5), (0.21, 1.5), (0.5, 0.4))):
    """Rows in which the loss of a schedule is 1 less what `better` says, at the middle rate."""
    rows = []
    for workload in schedules.WORKLOADS:
        for steps in SETTINGS.budgets:
            for name in schedules.names(SETTINGS):
                loss = 1 - better.get(name, 0.0) + np.array([0.2, 0.0, 0.3])[:, None]
                loss = loss + 0.01 * np.arange(2)
                row = {"workload": workload, "steps": steps, "schedule": name, "rates": [1, 2, 3]}
                shape = np.linspace(1, 0, 101).tolist()
                row |= {"choose": loss.tolist(), "judge": loss.tolist(), "shape": shape}
                rows.append(row | {"warmup": steps // 10 if name == REFINED else 0})
    for name, (new, old) in zip(CONTINUED, continued, strict=True):
        upstream = np.geomspace(0.1, old, 9) * (1 + np.outer([0.0, 0.1], np.ones(9)))
        downstream = np.geomspace(3.0, new, 9) * np.ones((2, 1))
        row = {"continued": name, "upstream": upstream.tolist()}
        rows.append(row | {"downstream": downstream.tolist()})
    return rows


SETTINGS = replace(schedules.Settings(), seeds=2, adam=(1, 2, 3), sgd=(1, 2, 3))


def test_claims_and_figure_of_made_up_rows():
    better = {LINEAR: 0.2, COSINE: 0.15, "UBA 1": 0.2, POWER: 0.18, REFINED: 0.25}
    rows = made_up(better)
    claims = schedules.claims(SETTINGS, rows)
    assert [claim.holds for claim in claims] == [True] * 10
    assert "at the end of the grid in 0 of 42" in claims[0].measured
    assert isinstance(schedules.plot(SETTINGS, rows), Figure)
    gain = schedules.gain(SETTINGS, rows, LINEAR, CONSTANT)
    expected = np.mean(np.log([0.8 / 1.0, 0.81 / 1.01]))
    assert gain.mean == pytest.approx(expected) and (gain.wins, gain.of) == (6, 6)
    worse = made_up(
        {LINEAR: -0.2, POWER: -0.2, REFINED: -0.25},
        ((0.2, 0.3), (2.0, 0.05), (0.5, 0.2), (0.5, 0.4)),
    )
    for row in worse:
        row["warmup"] = 0
    assert [claim.holds for claim in schedules.claims(SETTINGS, worse)] == [False] * 10


def test_settings_that_do_not_fit():
    for change, match in (
        ({"budgets": (300, 100)}, r"budgets=\(300, 100\): 10 or more, in rising order"),
        ({"second": 61}, "second=61 is no multiple of settings.every=20"),
        ({"train": 1797}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            schedules.run(replace(SMALL, **change), None)
