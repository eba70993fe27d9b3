from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import critical_batch
from experiments.critical_batch import crossing, find
from tests.runs import all_rows

SMALL = replace(
    critical_batch.Settings(), widths=(8,), examples=(256, 512), batches=(8, 16, 64), floor=10,
    lr=(4e-3, 2e-2), averages=(0.0, 0.8), seeds=2, validations=6, held_out=64, warmup=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return all_rows(critical_batch.run(SMALL, None))


def test_runs_of_every_batch_size(small):
    assert [row["batch"] for row in small] == [8, 16, 64]
    for row in small:
        loss = np.array(row["loss"])
        assert loss.shape == (2, 2, len(row["steps"]), 2)
        assert loss[1, :, -1].max() < loss[1, :, 0].min()  # the higher rate has learned
        assert row["steps"] == critical_batch.checkpoints(SMALL, row["batch"]).tolist()
        # an embedding of 48 characters, and the two layers
        assert row["parameters"] == 48 * 16 + (4 * 16 + 1) * 8 + (8 + 1) * 48
    assert small[0]["steps"][-1] == 1.5 * 512 / 8 + 10


def test_the_reference_reaches_its_own_target(small):
    for data in SMALL.examples:
        found = find(SMALL, small, 8, data)
        assert found.steps[0] == pytest.approx(data / 8, rel=1e-6)
    assert find(SMALL, small, 8, 512).target < find(SMALL, small, 8, 256).target


def test_averages_of_weights_are_means_at_first(small):
    # a decay above t / (t + 1) is cut to it: after one step the mean is the weights themselves
    first = np.array(small[2]["loss"])[:, :, 0]
    assert small[2]["steps"][0] > 1 and not np.allclose(first[..., 0], first[..., 1])


def test_crossing_is_exact_for_a_power_law():
    steps = np.array([1, 3, 10, 100])
    losses = 2 * steps**-0.5
    assert crossing(steps, losses, 2 * 5**-0.5) == pytest.approx(5)
    assert crossing(steps, losses, 3.0) == 1.0
    assert crossing(steps, losses, 0.1) == np.inf


SETTINGS = critical_batch.Settings()


def made_up(critical):
    """Rows in which what the smallest batch reaches after D examples takes D / B (1 + B / c) steps.

    This is up to a factor for all B; `critical` gives c by width and D.
    """
    rows = []
    for width in SETTINGS.widths:
        for batch in SETTINGS.batches:
            steps = np.unique(np.geomspace(1, 40_000, 400).round().astype(int))
            grid = np.geomspace(10, 1e6, 4000)
            c = critical(width, grid)
            need = grid / batch * (1 + batch / c) / (1 + SETTINGS.batches[0] / c)
            reach = np.interp(np.log(steps), np.log(need), np.log(grid))
            loss = np.tile(np.exp(-reach)[:, None], (1, SETTINGS.seeds, 1, 1))
            row = {"width": width, "parameters": 100 * width, "batch": batch}
            rows.append(row | {"steps": steps.tolist(), "loss": loss.tolist()})
    return rows


def test_claims_can_hold_and_fail():
    law = lambda width, data: 4 * data**0.47
    rows = made_up(law)
    found = critical_batch.table(SETTINGS, rows)
    # a + b / B with b / a = c: 1.2 times the smallest batch, and 0.2 c
    expected = [1.2 * 16 + 0.2 * law(0, d) for d in SETTINGS.examples]
    np.testing.assert_allclose(critical_batch.critical(found)[0], expected, rtol=0.02)
    assert critical_batch.misfit(SETTINGS, found[0][0]) < 0.01
    verdicts = [claim.holds for claim in critical_batch.claims(SETTINGS, rows)]
    assert verdicts[0] and verdicts[2]
    assert isinstance(critical_batch.plot(SETTINGS, rows), Figure)
    by_size = made_up(lambda width, data: 5.0 * width + 0 * data)
    assert [c.holds for c in critical_batch.claims(SETTINGS, by_size)][1:3] == [False, False]


def test_a_target_that_is_missed_is_said():
    rows = made_up(lambda width, data: 100 + 0 * data)
    for row in rows:
        if row["batch"] > 32:
            row["loss"] = (1e6 + 0 * np.array(row["loss"])).tolist()
    found = find(SETTINGS, rows, SETTINGS.widths[0], SETTINGS.examples[0])
    assert found.law is None and np.isfinite(found.steps).sum() == 2
    claims = critical_batch.claims(SETTINGS, rows)
    assert [claim.holds for claim in claims] == [False] * 4
    assert isinstance(critical_batch.plot(SETTINGS, rows), Figure)


def test_settings_and_texts_that_do_not_fit(tmp_path):
    for change, match in (
        ({"batches": (8, 16)}, r"batches=\(8, 16\): three or more"),
        ({"examples": (512, 256)}, r"examples=\(512, 256\): whole numbers in rising order"),
    ):
        with pytest.raises(ValueError, match=match):
            critical_batch.run(replace(SMALL, **change), None)
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        critical_batch.run(SMALL, tmp_path)
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(ValueError, match="9 characters, and 20000 or more"):
        critical_batch.run(SMALL, tmp_path)
