from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import lottery_ticket

SMALL = replace(
    lottery_ticket.Settings(), train=128, test=50, seeds=2, hidden=(16, 12), rounds=3, steps=30,
    batch=32, rewind=10,
)  # fmt: skip


def compute(settings):
    run = lottery_ticket.run(settings, None)
    states, rows = [run.init()], []
    for i in range(run.steps):
        state, new = run.step(i, states[-1])
        states.append(state)
        rows += new
    return states, rows


@pytest.fixture(scope="module")
def small():
    return compute(SMALL)


def test_masks_nest_and_lose_exactly_their_part(small):
    states, rows = small
    sizes = (64, 16, 12, 10)
    assert lottery_ticket.living(SMALL, sizes) == [
        {"layer_0": 1024, "layer_1": 192, "layer_2": 120},
        {"layer_0": 1024 - 205, "layer_1": 192 - 38, "layer_2": 120 - 12},
        {"layer_0": 819 - 164, "layer_1": 154 - 31, "layer_2": 108 - 11},
        {"layer_0": 655 - 131, "layer_1": 123 - 25, "layer_2": 97 - 10},
    ]
    alive = lottery_ticket.living(SMALL, sizes)
    for number, (before, after) in enumerate(pairwise(states[:4]), 1):
        for name, count in alive[number].items():
            old, new = (state["mask"][name]["kernel"] for state in (before, after))
            assert (new.sum((1, 2)) == count).all()
            assert not (new & ~old).any()
            assert after["mask"][name]["bias"].all()
    densities = [row["density"] for row in rows[:: len(lottery_ticket.ARMS)]]
    assert densities == [round(sum(a.values()) / 1336, 6) for a in alive]
    jax.tree.map(np.testing.assert_array_equal, states[3], states[4])  # nothing left to prune
    first, second = (np.asarray(states[3]["mask"]["layer_0"]["kernel"][i]) for i in (0, 1))
    assert (first != second).any()  # every seed has its own mask


def test_the_first_round_is_dense_training(small):
    """All weights live, so a ticket and its shuffled mask are the same network."""
    _, rows = small
    assert [row["arm"] for row in rows[:4]] == list(lottery_ticket.ARMS)
    assert rows[0]["test"] == rows[2]["test"] != rows[1]["test"]
    arms = len(lottery_ticket.ARMS)
    assert rows[arms]["test"] != rows[arms + 2]["test"]


def test_the_rewound_arm_starts_from_the_dense_network_of_step_k(small):
    states, rows = small
    arm = lambda name: np.array([row["test"] for row in rows if row["arm"] == name])
    ticket, late = arm(lottery_ticket.TICKET), arm(lottery_ticket.LATE)
    np.testing.assert_array_equal(late[0][:, 0], ticket[0][:, 0])  # at step 10, idle until then
    assert (late[0] != ticket[0]).any()  # the optimizer starts anew there
    first, second = (states[-1][name]["layer_0"]["kernel"] for name in ("mask", "late"))
    assert first.sum() == second.sum() and (first != second).any()


def test_claims_and_figure_of_made_up_rows():
    settings = replace(lottery_ticket.Settings(), seeds=2, test_every=200)
    rows = []
    for number, density in enumerate((1.0, 0.5, 0.15, 0.03)):
        ticket, new, shuffled = (
            (0.95, 0.97),
            (0.5, 0.97 - 0.02 * number),
            (0.5, 0.97 - 0.04 * number),
        )
        every = (ticket, new, shuffled, ticket)
        for arm, test in zip(lottery_ticket.ARMS, every, strict=True):
            curve = test if number else (0.9, 0.97)
            rows.append({"round": number, "density": density, "arm": arm, "test": [curve, curve]})
    claims = lottery_ticket.claims(settings, rows)
    assert [claim.holds for claim in claims] == [True, True, False, True, True, True]
    assert claims[1].measured == "200 steps, and 400 steps"
    assert claims[2].measured == "400 steps, and 400 steps"
    assert claims[3].measured == "6.0 points: 97.0% and 91.0%"
    worse = [row | {"test": rows[-2]["test"]} if row["round"] else row for row in rows]
    claims = lottery_ticket.claims(settings, worse)
    assert [claim.holds for claim in claims] == [False, False, True, False, False, True]
    assert claims[1].measured == "not within the run, and 400 steps"
    for some in (rows, worse):
        assert isinstance(lottery_ticket.plot(settings, some), Figure)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"prune": 0.0}, "prune=0.0: a number between 0 and 1"),
        ({"prune_output": 1.0}, "prune_output=1.0"),
        ({"rounds": 100}, "layer_1 has 2 weights in round [0-9]+: none would go"),
        ({"steps": 15}, "steps=15 is no multiple"),
        ({"rewind": 30}, "rewind=30: a step before steps=30"),
        ({"batch": 129}, "batch=129 is more than train=128"),
    ):
        with pytest.raises(ValueError, match=match):
            lottery_ticket.run(replace(SMALL, **change), None)


@pytest.mark.slow
def test_the_phenomenon():
    """Densities of 100, 17 and 3.4 %, as in a full run, with half its rounds."""
    settings = replace(
        lottery_ticket.Settings(), seeds=3, rounds=8, prune=0.36, prune_output=0.19, steps=300
    )
    _, rows = compute(settings)
    claims = lottery_ticket.claims(settings, rows)
    assert all(claim.holds for claim in claims), claims
    assert rows[-1]["density"] < 0.036
