from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import sub_networks
from experiments.sub_networks import PLAIN, SORTED
from tests.runs import all_rows

SETTINGS = replace(
    sub_networks.Settings(), train=900, test=400, seeds=2, widths=(2, 8, 64), steps=300,
    lr=5e-3, evaluations=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(sub_networks.run(SETTINGS, None))


def test_the_phenomenon_at_small_size(rows):
    claims = sub_networks.claims(SETTINGS, rows)
    assert len(claims) == 6
    holds = [claim.holds for claim in claims]
    assert holds[1]  # standard training, truncated
    assert holds[3:5] == [True, True]  # what can go, with and without sub-networks
    widths, accuracy = sub_networks.uniform(rows, SORTED)
    assert widths.tolist() == [2, 8, 64]
    _, plain = sub_networks.uniform(rows, PLAIN)
    assert (accuracy[1] > plain[1] + 0.2).all()
    loss = [row["loss"] for row in rows if "loss" in row and row["arm"] == SORTED]
    assert len(loss) == 10
    assert max(loss[-1]) < min(loss[0])


def test_every_network_has_its_row(rows):
    for arm in (SORTED, PLAIN):
        widths, size, errors = sub_networks.networks(rows, arm)
        assert widths.tolist() == [[a, b] for a in (2, 8, 64) for b in (2, 8, 64)]
        count = lambda a, b: 64 * a + a + a * b + b + 10 * b + 10
        due = [count(a, b) / count(64, 64) for a, b in widths]
        np.testing.assert_allclose(size, due)
        assert errors["test"].shape == (9, 2)


def test_searches_find_a_growing_part_of_the_front(rows):
    for name in ("local", "random"):
        found = sub_networks.volumes(SETTINGS, rows, name)
        assert found.shape == (5, 2)
        assert (np.diff(found, axis=0) >= -1e-6).all()
        assert (found <= 1 + 1e-4).all()
        assert (found > 0).all()


def test_claims_can_fail(rows):
    wrong = {"validation": [0.9, 0.9], "test": [0.9, 0.9]}
    failed = []
    for row in rows:
        if "entries" in row and row["arm"] == SORTED and row["widths"] != [64, 64]:
            row = row | wrong
        if "search" in row:
            row = row | {"points": [[0.9, 1.0]] * 5}
        failed.append(row)
    verdicts = [claim.holds for claim in sub_networks.claims(SETTINGS, failed)]
    full = sub_networks.claims(SETTINGS, rows)[2].holds  # not touched
    assert verdicts == [False, True, full, False, False, False]


def test_figure(rows):
    assert isinstance(sub_networks.plot(SETTINGS, rows), Figure)


def test_bad_settings():
    with pytest.raises(ValueError, match="steps=15 is no multiple of 10"):
        sub_networks.run(replace(SETTINGS, steps=15), None)
