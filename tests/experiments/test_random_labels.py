from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import figures, random_labels
from experiments.perceptron import init, logits
from tests.runs import all_rows

SETTINGS = replace(
    random_labels.Settings(), train=192, test=200, seeds=2, epochs=80, width=64, batch=64,
    corruption=(0.5,), epochs_per_step=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(random_labels.run(SETTINGS, None))


def test_the_phenomenon_at_small_size(rows):
    claims = random_labels.claims(SETTINGS, rows)
    assert len(claims) == 10
    verdicts = {claim.statement: claim.holds for claim in claims}
    shifts = "Nor do random crops (here: shifts)"
    assert [statement for statement, holds in verdicts.items() if not holds] in ([], [shifts])
    found = random_labels.curves(rows)
    assert found["true labels"].test.mean() > 0.85
    assert found["50% random labels"].train.min() == 1
    assert (random_labels.time_to_fit(found["true labels"]) < 80 * 3).all()


def test_every_condition_has_all_its_rows(rows):
    found = random_labels.curves(rows)
    assert list(found) == [cell.name for cell in random_labels.cells(SETTINGS)]
    for curve in found.values():
        assert curve.steps.tolist() == list(range(3, 241, 3))
        assert curve.loss.shape == curve.accuracy.shape == (80, 2)
        assert curve.train.shape == curve.test.shape == (2,)
    assert rows[0]["weights"] == 2 * 192 + 64
    assert rows[0]["error"] < 1e-8


def test_claims_can_fail(rows):
    """The same rows with the training accuracies of chance."""
    failed = [
        row | {"train": [0.1, 0.1], "accuracy": [0.1, 0.1]} if "train" in row else row
        for row in rows
    ]
    failed = [row | {"accuracy": [0.1, 0.1]} if "accuracy" in row else row for row in failed]
    claims = random_labels.claims(SETTINGS, failed)
    verdicts = [claim.holds for claim in claims]
    assert verdicts == [False, True, False, False, False, True, True, False, False, True]
    assert "not within the run" in claims[4].measured
    assert isinstance(random_labels.plot(SETTINGS, failed), Figure)


def test_the_figure_is_drawn(rows, tmp_path):
    figure = random_labels.plot(SETTINGS, rows)
    figure.savefig(tmp_path / "figure.png")
    assert len(figure.axes) == 4
    assert all(axes.get_xlabel() or axes.get_xticklabels() for axes in figure.axes)
    assert all(axes.get_ylabel() for axes in figure.axes)


def test_corruptions_are_those_of_the_paper():
    ps = jnp.array([0.0, 1.0, 0.5])
    key = jax.random.key(0)
    x = jax.random.uniform(key, (60, 4, 4, 1))
    x_test = jax.random.uniform(jax.random.key(1), (20, 4, 4, 1))
    y = jnp.arange(60) % 10
    sets = random_labels.corrupted(key, x, y, x_test, classes=10, ps=ps)
    assert sets["x"].shape == (4, 60, 4, 4, 1) and sets["x_test"].shape == (4, 20, 4, 4, 1)
    np.testing.assert_array_equal(sets["x"][0], x)
    np.testing.assert_array_equal(sets["y"][0], y)
    assert 30 < (sets["y"][1] != y).sum() <= 60
    shuffled = {name: np.asarray(sets[name][1]).reshape(-1, 16) for name in ("x", "x_test")}
    plain = {"x": np.asarray(x).reshape(-1, 16), "x_test": np.asarray(x_test).reshape(-1, 16)}
    order = [int(np.flatnonzero(plain["x"][0] == value)[0]) for value in shuffled["x"][0]]
    for name in plain:  # one permutation, for training and for test
        np.testing.assert_array_equal(shuffled[name], plain[name][:, order])
    scrambled = np.asarray(sets["x"][2]).reshape(-1, 16)
    np.testing.assert_array_equal(np.sort(scrambled), np.sort(plain["x"]))
    assert not (scrambled == shuffled["x"]).all(1).any()


def test_the_perceptron_cannot_see_shuffled_pixels():
    key = jax.random.key(0)
    x = jax.random.uniform(key, (10, 4, 4, 1))
    order = jax.random.permutation(key, 16)
    params = init(key, (16, 8, 3))
    moved = {**params, "layer_0": {**params["layer_0"]}}
    moved["layer_0"]["kernel"] = params["layer_0"]["kernel"][order]
    shuffled = x.reshape(10, 16)[:, order].reshape(x.shape)
    np.testing.assert_allclose(logits(moved, shuffled), logits(params, x), atol=1e-5)


def test_shifts_move_whole_images():
    image = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(1.0)
    out = random_labels.moved(jax.random.key(0), jnp.repeat(image, 400, 0), 1)
    places = np.argwhere(np.asarray(out)[..., 0])
    assert len(places) == 400
    seen, counts = np.unique(places[:, 1:], axis=0, return_counts=True)
    assert seen.tolist() == [[i, j] for i in (1, 2, 3) for j in (1, 2, 3)]
    assert ((counts - 400 / 9) ** 2 / (400 / 9)).sum() < 26.1  # chi-square, 8 degrees, 99.9 %
    same = random_labels.moved(jax.random.key(0), image, 0)
    np.testing.assert_array_equal(same, image)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"batch": 193}, "batch=193 is more than train=192"),
        ({"epochs": 81}, "epochs=81 is no multiple"),
        ({"train": 1700}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            random_labels.run(replace(SETTINGS, **change), None)


def test_spread_is_what_error_bars_want():
    low, high = figures.spread([[1.0, 2.0, 6.0]])
    assert (low.tolist(), high.tolist()) == ([2.0], [3.0])
