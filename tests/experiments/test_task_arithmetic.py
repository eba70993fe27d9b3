from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import task_arithmetic
from tests.runs import all_rows

SETTINGS = replace(
    task_arithmetic.Settings(), train=300, held_out=100, test=200, tasks=2, seeds=1, hidden=1,
    width=32, pretrain_steps=60, steps=100, subsets=1, scales=(0.25, 0.5, 1.0, 2.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return all_rows(task_arithmetic.run(SETTINGS, None))


def test_rows_hold_every_method_at_every_scale(rows):
    assert [row["tasks"] for row in rows] == [1] + [2] * len(task_arithmetic.STYLES)
    assert {row["method"] for row in rows[1:]} == {*task_arithmetic.STYLES}
    for name in task_arithmetic.STYLES:
        for kind in ("held_out", "test"):
            values = task_arithmetic.curves(rows, name, 2, kind)
            assert values.shape == (1, 1, 4) and (values >= 0).all() and (values < 1.5).all()
    single = rows[0]["single"]
    assert np.shape(single["forget"]) == np.shape(single["astray"]) == (2, 4, 2, 2)
    assert np.shape(single["dare"]) == (2, len(task_arithmetic.divisors(SETTINGS)), 2)


def test_methods_that_are_the_same_at_some_scales(rows):
    """The mean of two vectors at a scale is their sum at half of it."""
    mean, total = (task_arithmetic.curves(rows, m, 2) for m in ("average", "task arithmetic"))
    np.testing.assert_allclose(mean[..., 1:], total[..., :-1], atol=0.011)


def test_the_phenomenon_at_small_size(rows):
    own, base = np.array(rows[0]["own"])[1], np.array(rows[0]["base"])[1]
    assert (own > base).all()
    claims = task_arithmetic.claims(SETTINGS, rows)
    assert len(claims) == 11
    assert task_arithmetic.chosen(SETTINGS, rows, "task arithmetic", 2) > (base / own).mean()
    assert isinstance(task_arithmetic.plot(SETTINGS, rows), Figure)


def made_up(score, forget, dare):
    """Rows of two seeds and three tasks: at each scale a method has `score(method, tasks)`."""
    scales = np.array(SETTINGS.scales)
    single = {
        "forget": np.broadcast_to(forget, (3, 4, 2, 3)).tolist(),
        "astray": np.full((3, 4, 2, 3), 0.8).tolist(),
        "dare": np.broadcast_to(dare, (3, 2, len(task_arithmetic.divisors(SETTINGS))))
        .swapaxes(1, 2)
        .tolist(),
    }
    out = []
    for seed in range(2):
        flat = {"base": np.full((2, 3), 0.8).tolist(), "own": np.full((2, 3), 1.0).tolist()}
        out.append({"seed": seed, "tasks": 1, "single": single} | flat)
        for n in (2, 3):
            for method in task_arithmetic.STYLES:
                best, at = score(method, n)
                values = [(best - 0.1 * np.abs(np.log2(scales / at))).tolist()]
                row = {"seed": seed, "tasks": n, "method": method}
                out.append(row | {"held_out": values, "test": values})
    return out


def test_claims_can_fail():
    settings = replace(SETTINGS, tasks=3, seeds=2)
    verdicts = lambda *args: [
        claim.holds for claim in task_arithmetic.claims(settings, made_up(*args))
    ]
    forget = np.full((3, 4, 2, 3), 0.79)
    for task in range(3):
        forget[task, 2:, :, task] = 0.5
    grows = np.linspace(0.5, 0.9, len(task_arithmetic.divisors(SETTINGS)))

    def papers(method, n):
        bonus = {"PCB": 0.04, "TIES": 0.03, "Breadcrumbs": 0.02}.get(method, 0.0)
        moves = method == "task arithmetic" and n == 3
        return 0.99 - 0.05 * (n - 2) + bonus, 0.5 if moves else 1.0

    def otherwise(method, n):
        return (0.7 if method in ("TIES", "Breadcrumbs", "PCB", "DARE") else 0.75), 1.0

    assert verdicts(papers, forget, grows) == [True] * 11
    assert verdicts(otherwise, np.full((3, 4, 2, 3), 0.8), grows[::-1]) == [False] * 11


def test_settings_that_do_not_fit():
    for change, match in (
        ({"tasks": 9}, "tasks=9: 2 to 8 positions"),
        ({"scales": (0.5,)}, "1 has to be one of them"),
        ({"train": 1700}, "digits holds 1797"),
    ):
        with pytest.raises(ValueError, match=match):
            task_arithmetic.run(replace(SETTINGS, **change), None)
