"""Regimes of large batches and of one epoch: schedules stretched in time, sizes of models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import optim


def values(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)))


@pytest.mark.parametrize("factor", [1, 7, 41, 61])
def test_boundaries_come_exactly_as_much_later(factor):
    """Also where count / factor, as a product with 1 / factor, would fall below the boundary."""
    bounds = {2: 0.5, 7: 0.1, 150: 2.0, 9973: 0.3}
    plain = optax.piecewise_constant_schedule(1.0, bounds)
    stretched = optim.stretch(plain, factor)
    for at in bounds:
        around = np.array([at * factor - 1, at * factor, (at + 1) * factor - 1])
        np.testing.assert_array_equal(values(stretched, around), values(plain, [at - 1, at, at]))
        run, _ = jax.jit(lambda c: (stretched(c), c))(jnp.int32(at * factor))
        assert run == plain(at)


def test_as_many_updates_over_as_many_times_the_epochs():
    """Every value of the schedule is there `factor` times as long; horizons follow."""
    for plain in (
        optax.cosine_decay_schedule(1.0, 50),
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50, 0.1),
        optim.uba(1.0, 50, warmup=5),
        optim.rewarm(1.0, 50),
        optim.refined(np.linspace(3, 1, 50)),
    ):
        t = np.arange(0, 61)
        np.testing.assert_allclose(
            values(optim.stretch(plain, 4), 4 * t), values(plain, t), atol=1e-6
        )
        np.testing.assert_allclose(
            values(optim.stretch(plain, 0.5), t[:30]), values(plain, 2 * t[:30]), atol=1e-6
        )
        between = values(optim.stretch(plain, 4), np.arange(241))
        assert np.abs(np.diff(between)).max() < 0.6 * np.abs(np.diff(values(plain, t))).max()
    with pytest.raises(ValueError, match="factor=0"):
        optim.stretch(optax.constant_schedule(1.0), 0)


def test_a_refined_table_is_read_between_its_steps():
    schedule = optim.refined(np.ones(5))
    np.testing.assert_allclose(values(schedule, [0.5, 1.25, 4.0, 9.0]), [0.875, 0.6875, 0, 0])


def test_a_finished_cosine_stays_at_its_floor_and_rewarming_leaves_it():
    """Counting on with the old schedule trains the new data at the floor for ever."""
    old = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100, 0.1)
    np.testing.assert_allclose(values(old, np.arange(100, 200)), 0.1, rtol=1e-6)
    new = optax.join_schedules([old, optim.rewarm(1.0, 100, start=0.1, warmup=0.1)], [100])
    np.testing.assert_allclose(
        values(new, [99, 100, 105, 110, 200]), [0.1003, 0.1, 0.55, 1.0, 0.1], atol=1e-4
    )


def test_parameters_of_one_epoch():
    assert optim.one_epoch_parameters(1e9) == 2e8
    assert optim.one_epoch_parameters(2e9, ratio=20) == 1e8
    for bad in ({"tokens": 0.0}, {"tokens": 1e9, "ratio": 0.0}):
        with pytest.raises(ValueError, match="numbers above 0 were due"):
            optim.one_epoch_parameters(**bad)
