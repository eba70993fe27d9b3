import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import inr_init
from tests.runs import all_rows

SMALL = replace(
    inr_init.Settings(), shrink=40, width=8, hidden=2, seeds=2, steps=4, test_every=2, batch=32
)


@pytest.fixture(scope="module")
def rows():
    return all_rows(inr_init.run(SMALL, None))


def test_rows(rows):
    image = inr_init.photograph(40)
    assert rows[0]["size"] == [10, 16, 3] == list(image.shape)
    shown = inr_init.unpacked(rows[0]["image"], rows[0]["size"])
    np.testing.assert_array_equal(shown, (image * 255).round())
    found = inr_init.curves(rows)
    assert len(found) == 6
    for curve in found.values():
        assert curve.steps.tolist() == [2, 4] and curve.psnr.shape == (2, 2)
        unseen = np.indices((10, 16)).sum(0) % 2 == 1
        error = np.square(curve.image / 255 - image)[unseen].mean()  # of the first seed, clipped
        assert -10 * math.log10(error) >= curve.psnr[-1, 0] - 0.2
    assert isinstance(inr_init.plot(SMALL, rows), Figure)


def test_vi3nr_keeps_the_preactivations():
    """Every hidden layer has the deviation that was asked for; the others do not."""
    settings = replace(inr_init.Settings(), width=256, hidden=4)
    x = jax.random.uniform(jax.random.key(0), (200, 2), minval=-1)
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = {
        "first": {"kernel": spec(2, 256), "bias": spec(256)},
        "hidden": {"kernel": spec(3, 256, 256), "bias": spec(3, 256)},
        "head": {"kernel": spec(256, 3), "bias": spec(3)},
    }
    ways = inr_init.starts(settings, x)
    due = {"sine": settings.phase / settings.frequency, "Gaussian": 1.5538 * settings.bump}
    for activation, (phi, inits) in ways.items():
        for start, draw in inits.items():
            params = draw(jax.random.key(1), shapes)
            z, deviations = x @ params["first"]["kernel"] + params["first"]["bias"], []
            hidden = (params["hidden"][name] for name in ("kernel", "bias"))
            for kernel, bias in zip(*hidden, strict=True):
                deviations.append(float(z.std()) / due[activation])
                z = phi(z) @ kernel + bias
            if start == inr_init.VI3NR:
                np.testing.assert_allclose(deviations, 1, atol=0.15)
            elif start == inr_init.USUAL:
                assert min(deviations) > 2


def test_claims_of_made_up_rows(rows):
    values = {
        ("Gaussian", "VI3NR"): 24.0, ("Gaussian", "SIREN"): 17.0,
        ("Gaussian", "default of PyTorch"): 20.5, ("sine", "VI3NR"): 24.0,
        ("sine", "SIREN"): 24.9, ("sine", "default of PyTorch"): 10.0,
    }  # fmt: skip
    made_up = [
        row | {"psnr": [values[row["activation"], row["start"]]] * 2} if "start" in row else row
        for row in rows
    ]
    claims = inr_init.claims(SMALL, made_up)
    assert [claim.holds for claim in claims] == [True, True, True]
    at_the_end = "VI3NR 24.0 dB, SIREN 17.0 dB, default of PyTorch 20.5 dB"
    assert claims[0].measured == f"at 2 of 2; at the end {at_the_end}"
    assert claims[1].measured == "3.5 dB above it (Gaussian), 14.0 dB (sine)"
    flat = [row | {"psnr": [20.0, 20.0]} if "start" in row else row for row in rows]
    assert [claim.holds for claim in inr_init.claims(SMALL, flat)] == [False, False, True]


def test_settings_that_do_not_fit():
    for change, match in (
        ({"shrink": 400}, "shrink=400 leaves 1 by 1 pixels"),
        ({"batch": 81}, "batch=81: 1 to 80 pixels"),
        ({"steps": 5}, "steps=5 must be a multiple"),
        ({"bump": 0.0}, "positive numbers are due"),
    ):
        with pytest.raises(ValueError, match=match):
            inr_init.run(replace(SMALL, **change), None)
    with pytest.raises(ValueError, match="its own photograph"):
        inr_init.run(SMALL, Path("folder"))
