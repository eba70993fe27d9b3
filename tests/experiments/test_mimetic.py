from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import mimetic

SMALL = replace(mimetic.Settings(), train=64, test=40, seeds=2, width=8, heads=2, epochs=2, early=1)


@pytest.fixture(scope="module")
def small():
    run = mimetic.run(SMALL, None)
    states, rows = [run.init()], []
    for i in range(run.steps):
        state, new = run.step(i, states[-1])
        states.append(state)
        rows += new
    return states, rows


def test_the_starts_differ_in_the_attention_alone(small):
    states, _ = small
    params = states[0][0]
    same = jax.tree.map(lambda leaf: bool((leaf[0] == leaf[1]).all()), params)
    attention = jax.tree.leaves(same.pop("attention"))
    assert attention == [False] * 4 and all(jax.tree.leaves(same))
    usual, other = params["up"]["kernel"][0]
    assert (usual != other).any()  # every seed has its own weights


def test_mimetic_products_are_near_the_identity(small):
    first = small[1][1]
    assert first["arm"] == mimetic.MIMETIC
    vo = np.array(first["vo"])
    noise = 0.4 / 8**0.5  # its deviation; the diagonal is the mean of 8 of them
    assert abs(np.trace(vo) / 8 + 0.4) < 4 * noise / 8**0.5
    assert abs(np.trace(np.array(small[1][0]["vo"]))) / 8 < 0.2


def test_patches_are_cut_row_by_row():
    images = jnp.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    out = mimetic.patches(images, 2)
    assert out.shape == (2, 6, 4)
    assert out[0, :2].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert out[0, 3].tolist() == [12, 13, 18, 19]


def test_claims_and_figure(small):
    _, rows = small
    assert len(mimetic.claims(SMALL, rows)) == 4
    assert isinstance(mimetic.plot(SMALL, rows), Figure)
    made_up = []
    for row in rows:
        ahead = row["arm"] == mimetic.MIMETIC
        if "epoch" in row:
            row = row | {"test": [0.9, 0.8 + 0.02 * ahead], "loss": [1.0, 1.0 - 0.5 * ahead]}
        else:
            size = 0.3 if ahead else 0.01
            row = row | {"qk diagonal": [size, size], "vo diagonal": [-size, -size]}
        made_up.append(row)
    claims = mimetic.claims(SMALL, made_up)
    assert [claim.holds for claim in claims] == [True, True, True, False]
    assert claims[0].measured == "86.0% and 85.0%: +1.0 points, ahead with 1 of 2 seeds"
    assert "in 2 of 2 epochs; in 50.0% of all pairs" in claims[2].measured


def test_settings_that_do_not_fit():
    for change, match in (
        ({"patch": 3}, "patch=3 does not divide images of 8 by 8"),
        ({"batch": 65}, "batch=65 is more than train=64"),
        ({"heads": 3}, "width=8 is no multiple of heads=3"),
        ({"early": 3}, "early=3: an epoch up to 2"),
    ):
        with pytest.raises(ValueError, match=match):
            mimetic.run(replace(SMALL, **change), None)
