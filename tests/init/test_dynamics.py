"""The exact solution of deep linear learning against gradient descent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.dynamics import aligned, learning_time, linear_modes, mode_strength


@functools.partial(jax.jit, static_argnums=1)
def two_layer_descent(eta, steps, s=2.0, u0=1e-3):
    """Strength a*b of one mode under gradient descent, from a = b."""

    def step(ab, _):
        a, b = ab
        error = s - a * b
        return (a + eta * b * error, b + eta * a * error), a * b

    return jax.lax.scan(step, (jnp.sqrt(u0), jnp.sqrt(u0)), length=steps)[1]


def test_two_layers_against_gradient_descent():
    errors = []
    for eta, steps in ((1e-3, 8000), (5e-4, 16000)):
        u = two_layer_descent(eta, steps)
        exact = mode_strength(jnp.arange(float(steps)), 2.0, 1e-3, tau=1 / eta)
        errors.append(float(jnp.abs(u - exact).max()))
    assert errors[0] == pytest.approx(0.0028, abs=5e-4)
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("depth", [2, 3, 8, math.inf])
def test_strength_and_time_are_inverse(depth):
    s, u0 = 1.5, 0.1
    strengths = [0.2, 0.7, 1.2, 1.45]
    times = jnp.array([learning_time(u0, u, s, depth=depth, tau=10.0) for u in strengths])
    u = mode_strength(times, s, u0, depth=depth, tau=10.0)
    np.testing.assert_allclose(u, strengths, rtol=1e-4)


def test_learning_times():
    # modes in proportion: twice the correlation is learned in half the time
    assert learning_time(1e-3, 0.9, 1.0) / learning_time(2e-3, 1.8, 2.0) == pytest.approx(2)
    closed = lambda u: math.log(u / (1.5 - u)) / 1.5**2 - 1 / (1.5 * u)
    exact = closed(1.4) - closed(0.1)
    assert learning_time(0.1, 1.4, 1.5, depth=math.inf) == pytest.approx(exact, rel=1e-9)
    # with the rate over the depth, deep networks approach the limit
    deep = learning_time(0.1, 1.4, 1.5, depth=1000) * 1000
    assert deep == pytest.approx(exact, rel=0.01)


def test_modes_decouple_from_an_aligned_start():
    depth, eta, steps, u0 = 3, 2e-3, 1200, 0.2
    keys = jax.random.split(jax.random.key(0), 3)
    orthogonal = jax.nn.initializers.orthogonal()
    v, u = orthogonal(keys[0], (4, 3)), orthogonal(keys[1], (5, 3))
    strengths = jnp.array([2.0, 1.0, 0.5])
    correlation = (v * strengths) @ u.T
    kernels = aligned(keys[2], correlation, depth, u0=u0, width=6)
    assert [w.shape for w in kernels] == [(4, 6), (6, 6), (6, 5)]
    np.testing.assert_allclose(kernels[0].T @ kernels[0], kernels[1] @ kernels[1].T, atol=1e-6)

    def loss(ws):  # whitened inputs: 1/2 ||W - correlation||^2 up to a constant
        product = functools.reduce(jnp.matmul, ws)
        return 0.5 * jnp.square(product - correlation).sum()

    def step(ws, _):
        grads = jax.grad(loss)(ws)
        ws = jax.tree.map(lambda w, g: w - eta * g, ws, grads)
        return ws, v.T @ functools.reduce(jnp.matmul, ws) @ u

    with jax.default_matmul_precision("highest"):
        modes = jax.jit(lambda ws: jax.lax.scan(step, ws, length=steps)[1])(kernels)
    off = modes * (1 - jnp.eye(3))
    assert float(jnp.abs(off).max()) < 2e-6
    times = jnp.arange(1.0, steps + 1)
    for i, s in enumerate(strengths):
        exact = mode_strength(times, float(s), u0, depth=depth, tau=1 / eta)
        np.testing.assert_allclose(modes[:, i, i], exact, atol=0.005)


def test_linear_modes_of_data():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.nn.initializers.orthogonal()(keys[0], (40, 4)) * math.sqrt(40)
    w = jax.random.normal(keys[1], (4, 3))
    modes = linear_modes(x, x @ w)
    np.testing.assert_allclose((modes.v * modes.s) @ modes.u.T, w, atol=1e-5)
    with pytest.raises(ValueError, match="not whitened"):
        linear_modes(2 * x, x @ w)
    with pytest.raises(ValueError, match="examples"):
        linear_modes(x[1:], x @ w)


def test_orthogonal_starts_learn_at_any_depth():
    """Steps until all modes, aligned with the start, have grown from 1 to 1.9 of 2."""
    n, eta, steps = 16, 0.05, 400

    def steps_to_learn(draw, depth):
        ws = jnp.stack([draw(k, (n, n)) for k in jax.random.split(jax.random.key(0), depth)])
        u, _, vt = np.linalg.svd(functools.reduce(np.matmul, np.asarray(ws, np.float64)))
        target = jnp.asarray(2 * u @ vt, jnp.float32)

        def loss(ws):
            h, _ = jax.lax.scan(lambda h, w: (h @ w, None), jnp.eye(n), ws)
            return 0.5 * jnp.square(h - target).sum()

        def step(ws, _):
            value, g = jax.value_and_grad(loss)(ws)
            return ws - eta / depth * g, value

        losses = jax.jit(lambda ws: jax.lax.scan(step, ws, length=steps)[1])(ws)
        learned = np.flatnonzero(np.asarray(losses) < 0.5 * n * 0.1**2)
        return int(learned[0]) if learned.size else steps

    orthogonal = jax.nn.initializers.orthogonal()
    gaussian = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    shallow, deep = steps_to_learn(orthogonal, 4), steps_to_learn(orthogonal, 16)
    for depth, count in ((4, shallow), (16, deep)):
        exact = learning_time(1.0, 1.9, 2.0, depth=depth, tau=depth / eta)
        assert count == pytest.approx(exact, rel=0.15)
    assert 0.5 < deep / shallow < 2
    assert steps_to_learn(gaussian, 16) == steps


def test_traced_numbers_and_vmap():
    t = jnp.linspace(0.0, 5.0, 6)
    f = jax.jit(lambda s, u0: mode_strength(t, s, u0, depth=3))
    sweep = jax.vmap(lambda s: mode_strength(t, s, 0.1, depth=3))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(f(2.0, 0.1), sweep[1], rtol=1e-4)
    assert sweep.dtype == jnp.float32


def test_bad_input():
    with pytest.raises(ValueError, match="0 < u0 < s"):
        mode_strength(jnp.ones(1), 1.0, 2.0)
    with pytest.raises(ValueError, match="weight layers"):
        mode_strength(jnp.ones(1), 1.0, 0.1, depth=2.5)
    with pytest.raises(ValueError, match="u0 <= u < s"):
        learning_time(0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="two kernels or more of width 2"):
        aligned(jax.random.key(0), jnp.eye(2), 2, u0=0.1, width=1)
    with pytest.raises(TypeError, match="typed key"):
        aligned(jax.random.PRNGKey(0), jnp.eye(2), 2, u0=0.1)
