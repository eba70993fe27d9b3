"""Lookahead against optax's, its stationary variance, its state; AdaMax as in the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import optim

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "n": jnp.ones(2)}
GRADS = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=(17, *w.shape)), jnp.float32), PARAMS)


def run(tx, params=PARAMS, grads=GRADS):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), grads))()


def test_it_is_optax_lookahead_without_its_type_of_params():
    tx = optim.lookahead(optax.adam(0.1), every=4, slow_step=0.3)
    (got, state), _ = run(tx)
    other = optax.lookahead(optax.adam(0.1), 4, 0.3)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    opt = other.init(pair)
    for t in range(17):
        updates, opt = other.update(jax.tree.map(lambda g, t=t: g[t], GRADS), opt, pair)
        pair = optax.apply_updates(pair, updates)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], pair.fast[name], rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.slow[name], pair.slow[name], rtol=0, atol=1e-6)


def test_limits():
    (plain, _), _ = run(optax.adam(0.1))
    (same, _), _ = run(optim.lookahead(optax.adam(0.1), every=3, slow_step=1.0))
    (small, _), _ = run(optax.sgd(0.05))
    (one, _), _ = run(optim.lookahead(optax.sgd(0.1), every=1, slow_step=0.5))
    for name in PARAMS:
        np.testing.assert_allclose(same[name], plain[name], rtol=0, atol=2e-6)
        np.testing.assert_allclose(one[name], small[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "reset", "pullback"])
def test_after_every_kth_update_fast_is_slow_to_the_bit_and_moments_are_as_said(moments):
    tx = optim.lookahead(optax.sgd(0.1, momentum=0.9), every=5, moments=moments)
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(10):
        before = state
        updates, state = tx.update(jax.tree.map(lambda g, t=t: g[t], GRADS), state, params)
        params = optax.apply_updates(params, updates)
        same = all(jnp.array_equal(params[n], state.slow[n]) for n in params)
        assert same == (t % 5 == 4)
    g = jax.tree.map(lambda g: g[9], GRADS)
    kept = 0.9 * before.inner[0].trace["w"] + g["w"]
    got = state.inner[0].trace["w"]
    if moments == "keep":
        np.testing.assert_allclose(got, kept, rtol=1e-6)
    if moments == "reset":
        assert not np.any(got)
    if moments == "pullback":
        np.testing.assert_allclose(got, (before.anchor[0].trace["w"] + kept) / 2, rtol=1e-5)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    (low, state), _ = run(tx, half, jax.tree.map(lambda g: g[:15].astype(jnp.bfloat16), GRADS))
    assert all(jnp.array_equal(low[n], state.slow[n]) for n in low)


def test_reset_states_hold_the_synchronized_weights():
    """Schedule-free SGD keeps a sequence z of its own, which starts at the weights."""
    free = optax.contrib.schedule_free_sgd(0.1, b1=0.9)
    tx = optim.lookahead(free, every=3, moments="reset")
    first = jax.tree.map(lambda g: g[:3], GRADS)
    (params, state), _ = run(tx, PARAMS, first)
    want = jax.jit(free.init)(params)
    assert np.abs(params["w"] - PARAMS["w"]).max() > 1e-3
    for got, fresh in zip(jax.tree.leaves(state.inner), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, fresh)


def test_stationary_variance_on_a_noisy_parabola():
    """x <- x - g a (x - xi), a = 0.5, g = 0.4: slow weights have 0.0443, SGD 0.1111."""
    a, g, alpha, k, rho = 0.5, 0.4, 0.5, 5, 0.8
    sgd = g**2 * a**2 / (1 - rho**2)
    gain = alpha**2 * (1 - rho ** (2 * k))
    want = gain / (gain + 2 * alpha * (1 - alpha) * (1 - rho**k)) * sgd
    noise = jax.random.normal(jax.random.key(0), (400, 20_000))

    def final(tx):
        def step(carry, xi):
            x, state = carry
            updates, state = tx.update(a * (x - xi), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(20_000)
        return jax.lax.scan(step, (x, tx.init(x)), noise)[0][0].var()

    slow, fast = jax.jit(
        lambda: (final(optim.lookahead(optax.sgd(g), every=k)), final(optax.sgd(g)))
    )()
    np.testing.assert_allclose([slow, fast], [want, sgd], rtol=0.03)


def test_bad_input():
    for options, match in (
        ({"every": 0}, "every=0"),
        ({"every": np.int64(0)}, "every=0"),
        ({"slow_step": jnp.float32(7)}, r"slow_step=7"),
        ({"slow_step": 0.0}, "slow_step=0"),
        ({"moments": "drop"}, "moments='drop'"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.lookahead(optax.sgd(0.1), **options)
    tx = optim.lookahead(optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_adamax_is_the_papers():
    with jax.enable_x64(True):
        w, g = RNG.normal(size=5), RNG.normal(size=(50, 5))
        g[:, 3] = 0
        m, u, x = np.zeros(5), np.zeros(5), w.copy()
        for t in range(50):
            m, u = 0.9 * m + 0.1 * g[t], np.maximum(0.999 * u, np.abs(g[t]))
            ratio = np.divide(m, u, out=np.zeros(5), where=u > 0)
            x -= 0.01 / (1 - 0.9 ** (t + 1)) * ratio
        (got, _), _ = run(optim.adamax(0.01), {"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
        np.testing.assert_allclose(got["w"], x, rtol=1e-12)
    for b2 in (1.0, np.float32(1.0), jnp.ones(())):
        with pytest.raises(ValueError, match=r"b2=1\.0"):
            optim.adamax(b2=b2)
    with pytest.raises(TypeError, match="'steps' has dtype int32, and floats were due"):
        optim.adamax().init({"w": jnp.ones(2), "steps": jnp.arange(2)})


def test_adam_of_optax_has_the_papers_properties():
    """First step, scale invariance, constant gradients: what other methods here rely on."""
    (_, _), path = run(optax.adam(0.1), {"w": jnp.zeros(3)}, {"w": jnp.ones((20, 3)) * 7.0})
    steps = np.diff(np.concatenate([np.zeros((1, 3)), path["w"]]), axis=0)
    np.testing.assert_allclose(steps, -0.1, rtol=1e-3)
    d = jnp.array([10.0, 0.1, 3.0])
    g = GRADS["w"]
    (plain, _), _ = run(optax.adam(0.1, eps=0), {"w": jnp.zeros((4, 3))}, {"w": g})
    (scaled, _), _ = run(optax.adam(0.1, eps=0), {"w": jnp.zeros((4, 3))}, {"w": g * d})
    np.testing.assert_allclose(plain["w"], scaled["w"], atol=1e-5)
