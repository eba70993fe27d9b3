from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import dynamic_sparse as experiment
from tests.runs import all_rows

SETTINGS = replace(
    experiment.Settings(), train=400, test=200, seeds=2, width=48, steps=320, every=40,
    sparsity=0.95,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(experiment.run(SETTINGS, None))


def test_every_method_has_its_density_at_every_test(rows):
    found = experiment.curves(rows)
    assert tuple(found) == experiment.METHODS
    weights = 64 * 48 + 48 * 48 + 48 * 10
    end = int(SETTINGS.stop * SETTINGS.steps)
    for name, curve in found.items():
        assert curve.steps.tolist() == list(range(40, 321, 40))
        assert curve.test.shape == curve.density.shape == (8, 2)
        assert (curve.nonzero <= curve.density).all()
        alive = curve.density * weights
        if name == experiment.DENSE:
            assert (alive == weights).all()
            continue
        assert np.abs(alive[-1] - 0.05 * weights).max() <= 3
        if name in (experiment.GRADUAL, experiment.GRANET):
            first = 0.0 if name == experiment.GRADUAL else SETTINGS.initial_sparsity
            last_change = np.minimum(curve.steps - 40, end)
            cubic = 0.95 + (first - 0.95) * (1 - last_change / end) ** 3
            np.testing.assert_allclose(curve.density[:, 0], 1 - cubic, atol=3e-4)
        else:
            assert (alive == alive[0]).all()


def test_the_order_of_the_methods_at_small_size(rows):
    last = {name: curve.test[-1].mean() for name, curve in experiment.curves(rows).items()}
    assert last[experiment.DENSE] > 0.9
    assert last[experiment.UNIFORM] == min(last.values())
    assert min(last[n] for n in (experiment.RIGL, experiment.GRADUAL, experiment.GRANET)) > 0.8


def test_claims_can_fail(rows):
    """The same rows, with all methods at chance, and a mask that lets something through."""
    claims = experiment.claims(SETTINGS, rows)
    assert len(claims) == 8 and all(type(claim.holds) is bool for claim in claims)
    assert claims[0].holds and claims[2].holds
    flat = [row | {"test": [0.1, 0.1], "nonzero": [1e4, 1e4]} for row in rows]
    failed = [claim.holds for claim in experiment.claims(SETTINGS, flat)]
    assert failed == [False, False, False, False, False, True, True, False]


def test_the_figure_is_drawn(rows, tmp_path):
    figure = experiment.plot(SETTINGS, rows)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    figure.savefig(tmp_path / "figure.png")
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"steps": 250}, "steps=250 is no multiple of every=40"),
        ({"stop": 1.5}, "stop=1.5"),
        ({"train": 1700}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            experiment.run(replace(SETTINGS, **change), None)
