from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import sparse_speed

SMALL = replace(
    sparse_speed.Settings(), width=64, batch=8, block=8, hidden=32, channels=8, rounds=2,
    sparsities=(0.5, 0.96875),
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    run = sparse_speed.run(SMALL, None)
    return [row for i in range(run.steps) for row in run.step(i, run.init())[1]]


def test_every_format_is_measured_and_right(rows):
    """(A format that does not compute the masked product raises.)"""
    times = sparse_speed.table(rows)
    formats = {name for what, name in times if what == "product"}
    assert formats == {*sparse_speed.COLORS, "dense"}
    assert all(t > 0 for here in times.values() for t in here.values())
    assert len(times["product", "BCOO"]) == len(SMALL.sparsities)
    assert len(sparse_speed.claims(SMALL, rows)) == 6
    assert isinstance(sparse_speed.plot(SMALL, rows), Figure)


def test_memory(rows):
    sizes = sparse_speed.table(rows, "bytes")
    n = 64 * 64
    assert sizes["product", "dense"][0.0] == 4 * n
    assert sizes["product", "BCOO"][0.5] == 12 * n / 2
    assert sizes["product", "BCSR"][0.5] == 8 * n / 2 + 4 * 65
    assert sizes["product", "N:M"] == {0.5: 5 * n / 2, 0.75: 5 * n / 4, 0.875: 5 * n / 8}
    assert sizes["perceptron", "shrunk"][0.5] == 4 * (784 * 16 + 2 * 16 * 16 + 16 * 10)


def test_crossover():
    dense = 2.0
    times = {
        s: 16.0 * (1 - s) for s in sparse_speed.Settings().sparsities
    }  # as density, crosses at 7/8
    assert sparse_speed.crossover(times, dense) == pytest.approx(0.875)
    assert sparse_speed.crossover({0.5: 1.0, 0.75: 0.5}, dense) == 0.5
    assert sparse_speed.crossover({0.5: 4.0, 0.75: 3.0}, dense) is None
    # a fast point before a slow one is not where it starts to pay
    assert sparse_speed.crossover({0.5: 1.0, 0.75: 4.0, 0.875: 1.0}, dense) > 0.75


def test_claims_can_fail(rows):
    """The same rows, with every format slower and faster than it is."""
    scaled = lambda factor: [
        row | {"seconds": row["seconds"] * (1 if row["variant"] in ("dense", "masked") else factor)}
        for row in rows
    ]
    verdicts = [
        [claim.holds for claim in sparse_speed.claims(SMALL, scaled(f))] for f in (1e6, 1e-6)
    ]
    assert verdicts == [
        [False, False, True, True, False, False],
        [True, True, False, False, True, True],
    ]


def test_a_tenth_of_the_rounds_decides():
    row = {"what": "product", "variant": "dense", "sparsity": 0.0}
    rows = [row | {"seconds": s} for s in np.linspace(1, 2, 11)]
    assert sparse_speed.table(rows)["product", "dense"][0.0] == pytest.approx(1.1)
