"""Search over what to fine-tune: the objective by bits, the metric in closed form, the front."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks
from jaxkit.masks.subnets import pareto
from tests.counting import counting
from tests.masks import digits

KEY = jax.random.key(0)
UNITS = ["w0", "w1", ["w2", "bias2"]]


def setting():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32), jnp.asarray(rng.integers(0, 3, 16))
    params = digits.init(KEY, (4, 5, 5, 3))
    fit = lambda tx, params: digits.fit(KEY, tx, params, x, y, 10, batch=8)[0]
    return params, fit


def test_no_bits_change_nothing_and_all_are_plain_tuning():
    params, fit = setting()
    every = [*UNITS, "bias0", "bias1"]
    adam = optax.adam(0.01)
    objective, traces = counting(masks.memcontrol(adam, params, every, fit, lambda tuned: tuned))
    off, on = objective(jnp.zeros(5, bool)), objective(jnp.ones(5, bool))
    assert len(traces) == 1
    for a, b in zip(*map(jax.tree.leaves, (off, params)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    plain = jax.jit(fit, static_argnums=0)(adam, params)
    for a, b in zip(*map(jax.tree.leaves, (on, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_bit_trains_its_unit_alone():
    params, fit = setting()
    changed = lambda tuned: jnp.array([(tuned[k] != params[k]).any() for k in sorted(params)])
    objective = masks.memcontrol(optax.adam(0.01), params, UNITS, fit, changed)
    found = jax.jit(jax.vmap(objective))(jnp.eye(3, dtype=bool))
    owners = {"w0": 0, "w1": 1, "w2": 2, "bias2": 2}
    want = [[owners.get(k) == i for k in sorted(params)] for i in range(3)]
    np.testing.assert_array_equal(found, want)


def test_units_that_cannot_be():
    params, _ = setting()
    with pytest.raises(ValueError, match="'w0' belongs to the units 0 and 1"):
        masks.switch(jnp.ones(2, bool), params, ["w0", "w*"])
    with pytest.raises(ValueError, match=r"bits of shape \(2,\) came, and \(3,\) were due"):
        masks.switch(jnp.ones(2, bool), params, UNITS)
    with pytest.raises(ValueError, match="matches no leaf"):
        masks.switch(jnp.ones(1, bool), params, ["w9"])


def test_memorization_in_closed_form():
    """0 if the model does not read the prompt; s |v(c)| for eps(x, c) = x + s v(c)."""
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(6, 4, 4)), rng.normal(size=(6, 4, 4))
    blind = masks.memorization(jnp.asarray(x), jnp.asarray(x))
    assert blind["mean"] == blind["max"] == 0
    for s in (0.1, 3.0):
        found = masks.memorization(jnp.asarray(x + s * v), jnp.asarray(x))
        norms = s * np.linalg.norm(v.reshape(6, -1), axis=1)
        np.testing.assert_allclose(found["mean"], norms.mean(), rtol=1e-4)
        np.testing.assert_allclose(found["max"], norms.max(), rtol=1e-4)
    with pytest.raises(ValueError, match="equal ones are due"):
        masks.memorization(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_the_front_of_all_64_masks_is_that_of_brute_force():
    """Two objectives that compete, with equal points among them, through vmap of the objective."""
    params = {f"u{i}": jnp.zeros(1) for i in range(6)}
    cost = jnp.array([3.0, 1.0, 2.0, 2.0, 5.0, 1.0])
    gain = jnp.array([1.0, 2.0, 2.0, 1.0, 4.0, 2.0])
    one_step = lambda tx, p: optax.apply_updates(
        p, tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)[0]
    )
    on = lambda p: -jnp.stack([p[f"u{i}"][0] for i in range(6)])
    rewards = lambda p: jnp.stack([on(p) @ cost, 13.0 - on(p) @ gain])
    objective = masks.memcontrol(optax.sgd(1.0), params, list(params), one_step, rewards)
    bits = np.array(list(itertools.product([False, True], repeat=6)))
    points = np.asarray(jax.jit(jax.vmap(objective))(jnp.asarray(bits)))
    np.testing.assert_allclose(points[:, 0], bits @ np.asarray(cost), atol=1e-5)
    front = np.asarray(pareto(jnp.asarray(points)))
    beaten = lambda a, b: (b <= a).all() and (b < a).any()
    want = np.array([not any(beaten(p, q) for q in points) for p in points])
    first = np.array([not (points[:i] == p).all(1).any() for i, p in enumerate(points)])
    np.testing.assert_array_equal(front, want & first)
    assert 4 < front.sum() < 20 and (want & ~first).any()


@pytest.mark.slow
def test_fewer_trained_units_memorize_less():
    """A denoiser of 20 branches, pretrained on the digits 0-4 and tuned on 40 images of 5-9.

    Memorization is the denoising error on other images of 5-9 over that on the 40. It falls with
    the share of trained branches, and to train all of them is worse in both rewards than a part.
    """
    x, _, y, _ = digits.data()
    old, new = (x[np.flatnonzero(m)] for m in (np.asarray(y) < 5, np.asarray(y) >= 5))
    tuned_on, others, n = new[:40], new[40:], 20

    def init(key):
        normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
        first = {f"in{i}": normal(i, 64, 8) / 8 for i in range(n)}
        return first | {f"out{i}": normal(n + i, 8, 64) / np.sqrt(8 * n) for i in range(n)}

    def loss(params, x, key):
        z = x + 0.5 * jax.random.normal(key, x.shape)
        out = sum(jax.nn.relu(z @ params[f"in{i}"]) @ params[f"out{i}"] for i in range(n))
        return jnp.mean((out - x) ** 2)

    def train(tx, params, x, key):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (40,), 0, len(x))
            grads = jax.grad(loss)(params, x[rows], jax.random.fold_in(key, 1))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 1500)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    @jax.jit
    def run(bits):
        adam, keys = optax.adam(3e-3), jax.random.split(KEY, 20)
        error = lambda params, x: jax.vmap(lambda key: loss(params, x, key))(keys).mean()
        rewards = lambda p: jnp.stack([error(p, others) / error(p, tuned_on), error(p, others)])
        units = [[f"in{i}", f"out{i}"] for i in range(n)]
        fit = lambda tx, params: train(tx, params, tuned_on, KEY)
        pretrained = train(adam, init(KEY), old, KEY)
        return jax.vmap(masks.memcontrol(adam, pretrained, units, fit, rewards))(bits)

    share = np.array([20, 10, 5, 2, 1])
    found = np.asarray(run(jnp.arange(n) < share[:, None]))
    assert (np.diff(found[:, 0]) < 0).all(), found  # a rank correlation of 1
    assert found[0, 0] > 1.5 > 1.3 > found[-1, 0]
    front = np.asarray(pareto(jnp.asarray(found)))
    assert not front[0] and front[1:].any(), found
