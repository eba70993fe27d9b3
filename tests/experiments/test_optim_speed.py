import os
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import optim_speed
from experiments.optim_speed import CYCLE, OPTAX, OURS, THEIRS
from tests.runs import all_rows

SMALL = replace(
    optim_speed.Settings(),
    width=8,
    layers=1,
    rank=4,
    hidden=16,
    batch=64,
    rounds=1,
    threads=os.cpu_count() or 1,
)


@pytest.fixture(scope="module")
def rows():
    """What jaxkit alone takes."""
    return [r for r in all_rows(optim_speed.run(SMALL, None)) if r["library"] != THEIRS]


def test_everything_is_measured(rows):
    assert [(r["what"], r["library"]) for r in rows] == [
        ("SOAP", OURS), ("Fira", OURS), ("DP-SGD", OURS), ("DP-SGD", OPTAX),
    ]  # fmt: skip
    assert all(r["seconds"] > 0 for r in rows)
    params = 784 * 16 + 2 * 16 * 16 + 16 * 10 + 3 * 16 + 10
    mine, other = (r["bytes"] for r in rows if r["what"] == "DP-SGD")
    assert other > 4 * params * SMALL.batch > 4 * mine
    assert rows[-1]["difference"] < 1e-5
    assert isinstance(optim_speed.plot(SMALL, rows), Figure)


@pytest.mark.parametrize("what", ["SOAP", "Fira"])
def test_the_last_update_of_a_cycle_renews_the_bases(what):
    call = optim_speed.ours(what, SMALL)
    basis = lambda: np.array(jax.tree.leaves(call()[1][0].bases[0])[-1 if what == "SOAP" else 0])
    found = [basis() for _ in range(2 * CYCLE)]
    changed = [not np.array_equal(a, b) for a, b in pairwise(found)]
    assert changed == [i % CYCLE == CYCLE - 2 for i in range(2 * CYCLE - 1)]


def beside(rows, factor, renewal):
    """Add another package, whose updates take so many times as long."""
    factors = {"": factor, "renewal ": renewal}
    times = lambda r: {k + v: f * r[k + v] for k, f in factors.items() for v in ("seconds", "cpu")}
    two = [r for r in rows if r["what"] != "DP-SGD"]
    return rows + [r | times(r) | {"library": THEIRS} for r in two]


def test_claims_can_fail(rows):
    assert [claim.holds for claim in optim_speed.claims(SMALL, rows)] == [False] * 4 + [True] * 2
    assert "not measured" in optim_speed.claims(SMALL, rows)[0].measured
    verdicts = lambda *factors: [
        claim.holds for claim in optim_speed.claims(SMALL, beside(rows, *factors))
    ][:4]
    assert verdicts(1.1, 1.1) == [True] * 4
    assert verdicts(0.9, 0.9) == [False] * 4
    assert verdicts(100.0, 0.9) == [True, False] * 2
    assert isinstance(optim_speed.plot(SMALL, beside(rows, 2.0, 2.0)), Figure)
    costly = [r | ({"seconds": 1.0, "bytes": 100, "difference": 1e-4}) for r in rows]
    assert [c.holds for c in optim_speed.claims(SMALL, costly)][4:] == [False, False]


def test_renewals_are_spread_over_the_updates_between_them():
    row = {"what": "SOAP", "library": OURS, "seconds": 1.0, "renewal seconds": 6.0}
    settings = replace(SMALL, soap_every=10)
    assert optim_speed.spread_out(settings, [row], "SOAP", OURS, "seconds").tolist() == [1.5]
