"""Schedules of sparsity: closed forms, averages, and windows in shares of the compute."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks


def test_iterative_is_the_product_of_the_rounds():
    sparsity = masks.iterative(0.2)
    found = jax.vmap(sparsity)(jnp.arange(17))
    np.testing.assert_allclose(1 - found, np.cumprod([1.0, *[0.8] * 16]), rtol=1e-5)
    assert float(found[16]) == pytest.approx(1 - 0.0281475, abs=1e-6)  # 16 rounds of 20 %
    np.testing.assert_allclose(jax.vmap(lambda p: masks.iterative(p)(2))(jnp.array([0.5])), 0.75)


def test_exponential_ends_where_it_should_in_equal_ratios():
    density = 1 - jax.vmap(masks.exponential(0.99, 100))(jnp.arange(150))
    np.testing.assert_allclose(density[1:100] / density[:99], 0.01**0.01, rtol=1e-5)
    np.testing.assert_allclose(density[99:], 0.01, rtol=1e-5)
    assert float(masks.exponential(0.0, 3)(1)) == 0
    np.testing.assert_allclose(float(masks.exponential(0.9, 1)(0)), 0.9, rtol=1e-6)


def test_the_cubic_is_that_of_optax():
    """s_t = s_f (1 - (1 - x)^3): at both ends, in the middle, and at every step."""
    s_f, begin, end = 0.9, 100, 300
    schedule = optax.polynomial_schedule(0.0, s_f, 3, end - begin, begin)
    steps = np.arange(400)
    x = np.clip((steps - begin) / (end - begin), 0, 1)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), s_f * (1 - (1 - x) ** 3), atol=1e-6)
    assert float(schedule(200)) == pytest.approx(s_f * (1 - 1 / 8))
    assert [float(schedule(0)), float(schedule(399))] == pytest.approx([0, s_f])


@pytest.mark.parametrize("d", [0.1, 0.5])
@pytest.mark.parametrize(("a", "b"), [(0.25, 0.75), (0.1, 0.4)])
def test_average_density_against_closed_forms(d, a, b):
    steps = 20_000
    begin, length = int(a * steps), int((b - a) * steps)
    for power, mean in ((1, (1 + d) / 2), (3, d + (1 - d) / 4)):
        schedule = optax.polynomial_schedule(0.0, 1 - d, power, length, begin)
        found = float(masks.average_density(schedule, steps))
        assert found == pytest.approx(a + (b - a) * mean + (1 - b) * d, abs=1e-4)
    half = float(masks.average_density(schedule, steps, exempt=0.5))
    assert half == pytest.approx(0.5 + 0.5 * found, abs=1e-5)
    assert float(masks.average_density(lambda t: 0.3, 10)) == pytest.approx(0.7)
    assert float(masks.average_density(lambda t: 0.0, 10)) == 1


def density(sparsity, power, begin, end, steps):
    x = np.clip((np.arange(steps) - begin) / (end - begin), 0, 1)
    return (1 - sparsity) ** x if power is None else 1 - sparsity * (1 - (1 - x) ** power)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("power", [1, 3, None])
@pytest.mark.parametrize("exempt", [0.0, 0.2])
def test_the_window_has_its_shares_of_the_compute_within_a_step(sparsity, power, exempt):
    steps = 5000
    for start, stop in ((0.25, 0.75), (0.1, 1.0), (0.0, 0.5)):
        begin, end = masks.compute_window(
            sparsity, steps, start=start, end=stop, power=power, exempt=exempt
        )
        cost = exempt + (1 - exempt) * density(sparsity, power, begin, end, steps)
        total = cost.sum()
        # rounding moves either end by half a step, and the sum over steps is a step off the area
        assert abs(cost[:begin].sum() - start * total) <= 1
        assert abs(cost[:end].sum() - stop * total) <= 1


def test_check_values_of_the_window():
    assert masks.compute_window(0.8, 10_000) == (909, 5455)  # 0.0909 and 0.5454 of the steps
    schedule = optax.polynomial_schedule(0.0, 0.8, 3, 5455 - 909, 909)
    assert float(masks.average_density(schedule, 10_000)) == pytest.approx(0.364, abs=5e-4)
    assert masks.compute_window(0.0, 1000) == (250, 750)
    assert masks.compute_window(0.0, 1000, power=None) == (250, 750)


def test_bad_input():
    for fraction in (0, 1, 1.5):
        with pytest.raises(ValueError, match="fraction is"):
            masks.iterative(fraction)
    with pytest.raises(ValueError, match="sparsity is 1"):
        masks.exponential(1, 3)
    with pytest.raises(ValueError, match="rounds is 0"):
        masks.exponential(0.5, 0)
    with pytest.raises(ValueError, match=r"start=0\.5 and end=0\.25"):
        masks.compute_window(0.5, 100, start=0.5, end=0.25)
    with pytest.raises(ValueError, match="1 steps leave none"):
        masks.compute_window(0.5, 1, start=0.1, end=0.2)
    with pytest.raises(ValueError, match="power is 0"):
        masks.compute_window(0.5, 100, power=0)
    assert math.isfinite(sum(masks.compute_window(0.999999, 10**6)))
