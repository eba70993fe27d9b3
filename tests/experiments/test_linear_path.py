from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import linear_path
from tests.runs import all_rows

SETTINGS = replace(
    linear_path.Settings(), train=300, test=200, seeds=1, widths=(24,), push_width=24, steps=160,
    points=11, between=5, learned_steps=3, push_times=(0, 150),
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(linear_path.run(SETTINGS, None))


def test_the_phenomena_at_small_size(rows):
    claims = linear_path.claims(SETTINGS, rows)
    assert len(claims) == 9
    holds = [claim.holds for claim in claims]
    assert holds[:2] == [True, True]  # no obstacle on the way, and a barrier between networks
    assert holds[5]  # bits repeat


def test_lines_begin_and_end_at_the_networks(rows):
    for row in (row for row in rows if row["kind"] == "pair"):
        lines, alpha, beta = (np.array(row[name]) for name in ("line", "alpha", "beta"))
        assert lines.shape == (2, SETTINGS.points + 10) and alpha.shape == beta.shape == (2, 41)
        np.testing.assert_allclose(alpha[:, [0, -1]], [[0, 1]] * 2, atol=1e-6)
        np.testing.assert_allclose(beta[:, [0, -1]], 0, atol=1e-5)
        assert beta.max() > 0.1
        for name in linear_path.MATCHINGS:
            ends = [lines[j, SETTINGS.points - 1] for j in range(2)]
            np.testing.assert_allclose(np.array(row[name]["loss"])[[0, -1]], ends, atol=1e-4)
        assert row["weights"]["distance"] < row["none"]["distance"]


def test_pushes_are_later_smaller_and_none_without_size(rows):
    found = linear_path.pushes(rows, SETTINGS.sigma)
    assert sorted(found) == [0, 150]
    distance = lambda rows: np.mean([row["none"]["distance"] for row in rows])
    assert distance(found[0]) > distance(found[150]) > 0
    assert distance(linear_path.pushes(rows, 0.0)[0]) == 0
    assert distance(linear_path.pushes(rows, SETTINGS.sigma, single=True)[0]) > 0


@pytest.mark.slow
def test_a_push_leads_to_another_basin_early_and_not_late():
    """At a rate of 0.1 a network may diverge, by rounding alone; here all are trained."""
    settings = replace(
        linear_path.Settings(), widths=(), push_times=(0, 400), between=11, lr=0.08
    )  # fmt: skip
    found = linear_path.pushes(all_rows(linear_path.run(settings, None)), settings.sigma)
    ends = [row["none"]["loss"][i] for rows in found.values() for row in rows for i in (0, -1)]
    assert max(ends) < 1e-3
    early, late = (np.mean([row["none"]["barrier"] for row in found[t]]) for t in (0, 400))
    assert early > 100 * late and early > 1e-4


def test_claims_can_fail(rows):
    failed = deepcopy(rows)
    for row in failed:
        if row["kind"] == "pair":
            row["line"] = [[0.0, 1.0] * (len(row["t"][0]) // 2 + 1)] * 2
            row["line"] = [line[: len(row["t"][0])] for line in row["line"]]
            barriers = {"none": 0.01, "weights": 0.02, "activations": 0.02, "gradient": 0.03}
        else:
            barriers = {"none": 0.01, "weights": 0.001}
        for name, value in barriers.items():
            row[name]["barrier"] = value
            row[name]["distance"] = 1.0
    assert not any(claim.holds for claim in linear_path.claims(SETTINGS, failed))
    assert isinstance(linear_path.plot(SETTINGS, failed), Figure)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="must be below steps=100"):
        linear_path.run(replace(SETTINGS, steps=100), None)
