from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import optimizers
from experiments.optimizers import ADAMW, METHODS, NADAMW, SOAP, WORKLOADS

SMALL = replace(
    optimizers.Settings(), train=100, test=60, seeds=2, width=8, steps=40, batch=16, every=5,
    warmup=2, ladder=(0, 2), rank=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """Rows of the networks without compiling all of the pairs."""
    run = optimizers.run(SMALL, None)
    assert run.steps == len(METHODS) * len(WORKLOADS)
    pairs = [("teacher", ADAMW), ("teacher", SOAP), ("breast cancer", ADAMW), ("digits", ADAMW)]
    pairs += [("characters", ADAMW)]
    places = [WORKLOADS.index(w) * len(METHODS) + METHODS.index(m) for w, m in pairs]
    rows = [run.step(i, run.init())[1][0] for i in places]
    assert [(row["workload"], row["method"]) for row in rows] == pairs
    return rows


def test_every_workload_is_learned(small):
    for row in small:
        loss = np.array(row["loss"])
        assert loss.shape == (2, 2, 8) and np.isfinite(loss).all()
        assert loss[1].mean(0)[-1] < 0.9 * loss[1].mean(0)[0]  # the higher rate
        assert row["milliseconds"] > 0
    assert small[0]["rates"] == [0.001, 0.009] and small[1]["rates"] == [0.003, 0.027]


def test_runs_of_the_same_seed_begin_alike(small):
    adam, soap = (np.array(row["loss"])[0, :, 0] for row in small[:2])
    np.testing.assert_allclose(adam, soap, rtol=0.2)
    assert abs(adam[0] - adam[1]) > 1e-4


def made_up(speed):
    """Rows with a loss of 1 / (steps speed) at the default rate and half the speed at the other."""
    steps = SMALL.every * (1 + np.arange(SMALL.steps // SMALL.every))
    rows = []
    for workload in WORKLOADS:
        for method in METHODS:
            pace = speed.get((workload, method), speed.get(method, 1.0))
            loss = 1 / (pace * np.outer([1.0, 0.5], steps))
            loss = np.stack([loss, loss], 1)
            row = {"workload": workload, "method": method, "milliseconds": 8.0}
            rows.append(row | {"loss": loss.tolist()})
    return rows


def test_scores_of_known_curves():
    # AdamW reaches its target at 20 of 40 steps; 5 is the unit
    rows = made_up({SOAP: 4.0, "SGD, momentum": 0.2, ("digits", NADAMW): 2.0})
    assert optimizers.targets(SMALL, rows) == pytest.approx(dict.fromkeys(WORKLOADS, 1 / 20))
    found = optimizers.score(SMALL, rows)
    steps = dict(zip(METHODS, found.steps.tolist(), strict=True))
    assert steps[ADAMW] == [20.0] * 4 and steps[SOAP] == [5.0] * 4
    assert steps[NADAMW] == [10.0, 20.0, 20.0, 20.0]
    assert steps["SGD, momentum"] == [np.inf] * 4
    scores = dict(zip(METHODS, found.tuned.score, strict=True))
    assert scores[SOAP] == 1.0 and scores[ADAMW] == 0.0
    assert scores[NADAMW] == pytest.approx((4 - 2) / 3 / 4)
    assert optimizers.ratio(found.steps, SOAP, ADAMW) == pytest.approx(0.25)
    assert optimizers.ratio(found.steps, "SGD, momentum", ADAMW) == np.inf
    assert (found.rate == 0).all()  # the faster one
    np.testing.assert_array_equal(found.calibrated, found.default)
    assert optimizers.microseconds(SMALL, rows, SOAP) == 2000  # of four runs


def test_claims_can_hold_and_fail():
    rows = made_up({SOAP: 2.0, NADAMW: 1.4, "Lookahead": 2.0, "Prodigy": 0.2, "DoG": 0.2})
    names = ["fewer", "soap", "fira", "lookahead", "top", "none", "poor", "close"]
    verdicts = lambda rows: dict(
        zip(names, (claim.holds for claim in optimizers.claims(SMALL, rows)), strict=True)
    )
    found = verdicts(rows)
    assert all(found[name] for name in ("fewer", "soap", "fira", "lookahead", "poor"))
    assert not found["none"] and not found["close"]
    assert isinstance(optimizers.plot(SMALL, rows), Figure)
    found = verdicts(made_up({ADAMW: 0.5, SOAP: 0.1, "Fira": 0.2, "Prodigy": 1.0}))
    assert not any(found[name] for name in ("fewer", "soap", "fira", "top", "poor"))
    split = {("digits", SOAP): 4.0, ("teacher", "DoG"): 4.0}
    assert verdicts(made_up(split))["none"]


def test_settings_that_do_not_fit():
    for change, match in (
        ({"steps": 41}, "steps=41 is no multiple of settings.every=5"),
        ({"ladder": (1, 2)}, r"ladder=\(1, 2\): 0, the default rate, is due"),
        ({"target": 1.0}, "target=1.0"),
        ({"train": 1797}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizers.run(replace(SMALL, **change), None)
