"""Soft thresholds: the formula, its gradients, and sparsity that training finds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit import reparam
from tests.masks import digits

KEY = jax.random.key(0)


def test_the_threshold_cuts_and_shrinks():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)}
    r = reparam.soft_threshold(initial=0.2)
    theta = r.init(KEY, params)
    t = 1 / (1 + np.exp(-0.2))
    w = np.asarray(params["w"])
    want = np.sign(w) * np.maximum(np.abs(w) - t, 0)
    np.testing.assert_allclose(r.apply(theta, params)["w"], want, rtol=1e-5, atol=1e-6)
    assert 0 < (want == 0).sum() < 30
    grad = jax.grad(lambda theta: jnp.sum(r.apply(theta, params)["w"] * jnp.arange(5.0)))(theta)
    alive = np.abs(w) > t
    np.testing.assert_allclose(grad["w"]["value"], alive * np.arange(5.0), atol=1e-6)
    slope = -(alive * np.sign(w) * np.arange(5.0)).sum() * t * (1 - t)
    np.testing.assert_allclose(grad["w"]["threshold"], slope, rtol=1e-5)


def test_no_threshold_is_no_change():
    params = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    r = reparam.soft_threshold(initial=-200.0)
    np.testing.assert_array_equal(r.apply(r.init(KEY, params), params)["w"], params["w"])
    assert list(r.init(KEY, params)) == ["w"]


def test_weight_decay_on_the_thresholds_sets_the_sparsity():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(128, 8)), jnp.float32)
    y = jnp.asarray(np.abs(rng.normal(size=(128, 8))[:, :3]).argmax(1))
    params = digits.init(KEY, (8, 16, 3))
    r = reparam.soft_threshold(initial=-5.0)

    def run(decay):
        tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, momentum=0.9))
        loss = lambda theta: digits.cross_entropy(r.apply(theta, params), x, y)

        def step(carry, _):
            theta, state = carry
            updates, state = tx.update(jax.grad(loss)(theta), state, theta)
            return (optax.apply_updates(theta, updates), state), None

        theta = r.init(KEY, params)
        (theta, _), _ = jax.lax.scan(step, (theta, tx.init(theta)), None, 400)
        w = r.apply(theta, params)
        return jnp.mean(jnp.concatenate([(w[k] == 0).ravel() for k in ("w0", "w1")]))

    sparsity = jax.jit(jax.vmap(run))(jnp.array([0.0, 1e-3, 1e-2]))
    assert (np.diff(sparsity) > 0).all() and sparsity[2] > sparsity[0] + 0.2, sparsity
