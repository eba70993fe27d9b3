from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import soup
from tests.runs import all_rows

SETTINGS = replace(
    soup.Settings(), pretrain=200, train=400, held_out=150, test=200, seeds=2, models=3, width=32,
    pretrain_steps=150, steps=100, parts=2, learned_steps=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(soup.run(SETTINGS, None))


def test_the_phenomenon_at_small_size(rows):
    claims = soup.claims(SETTINGS, rows)
    verdicts = {claim.statement: claim.holds for claim in claims}
    assert len(claims) == 8
    assert verdicts["On the held-out data the greedy soup is never below the best model"]
    assert verdicts["Models that do not share their pretraining have no soup"]
    assert soup.measured(rows, "best model", "test").min() > 0.7


def test_rows_hold_every_kind_on_every_set(rows):
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        for kind in soup.KINDS:
            assert all(0 <= row[kind][name] <= 1 for name in soup.SETS)
        models = np.array([row["models"][name] for name in soup.SETS])
        assert models.shape == (3, 3)
        assert row["best model"]["held_out"] == models[0].max()
        assert row["mean model"]["test"] == pytest.approx(models[1].mean())
        assert row["grown"][0] == row["best model"]["test"]
        assert row["grown"][-1] == pytest.approx(row["uniform"]["test"], abs=0.011)
        assert 1 <= row["greedy"]["size"] <= 3


def test_claims_can_fail(rows):
    worse = dict.fromkeys(soup.SETS, 0.1) | {"size": 1}
    failed = [row | dict.fromkeys(("greedy", "uniform", "learned"), worse) for row in rows]
    failed = [row | {"apart": dict.fromkeys(soup.SETS, 0.9)} for row in failed]
    verdicts = [claim.holds for claim in soup.claims(SETTINGS, failed)]
    assert verdicts == [False, False, False, False, True, True, False, False]
    assert isinstance(soup.plot(SETTINGS, failed), Figure)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"steps": 101}, "steps=101 is no multiple of settings.parts=2"),
        ({"models": 1}, "models=1"),
        ({"train": 1700}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            soup.run(replace(SETTINGS, **change), None)
