"""DeepScaleLM: unit moments of blocks, and the moments of relu that they rest on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.deepscale import deepscale, relu_correlation, relu_covariance
from jaxkit.init.kernel import correlation_map, variance_map
from jaxkit.init.residual import deepscale_wire, residual

KEY = jax.random.key(0)


@pytest.mark.parametrize("r", [-0.6, 0.0, 0.3, 0.9, 1.0])
def test_relu_moments_against_monte_carlo(r):
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 4_000_000))
    y = r * x + math.sqrt(1 - r**2) * z
    a, b = np.maximum(x, 0), np.maximum(y, 0)
    assert abs(np.mean(a * b) - a.mean() * b.mean() - float(relu_covariance(r))) < 1e-3
    assert abs(np.mean(a * b) / np.mean(a * a) - float(relu_correlation(r))) < 2e-3


def test_relu_moments_in_closed_form():
    assert abs(float(relu_covariance(1.0)) - (math.pi - 1) / (2 * math.pi)) < 1e-6
    np.testing.assert_allclose(relu_correlation(jnp.array([0.0, 1.0])), [1 / math.pi, 1], rtol=1e-6)
    r = np.linspace(-1, 1, 21)
    kernel = r + (np.sqrt(1 - r**2) - r * np.arccos(r)) / np.pi
    np.testing.assert_allclose(relu_correlation(r), kernel, atol=1e-6)


def test_the_correlation_recursion_against_plain_python():
    p, layers, lambda2, beta2 = 0.1, 12, 0.9, 0.3  # not convex: s grows
    std = deepscale(64, layers, dropout=p, lambda2=lambda2, beta2=beta2)
    r, s, along = 0.221 * (1 - p), 1.0, []
    for _ in range(layers):
        along.append(r)
        for block in (
            lambda r: 1.0,
            lambda r: r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi,
        ):
            c = (1 - p) * block(r)
            r, s = (lambda2 * s * r + beta2 * c) / (lambda2 * s + beta2), lambda2 * s + beta2
    np.testing.assert_allclose(std.correlation, [*along, r], rtol=1e-5)
    expected = [math.sqrt(math.sqrt((1 - p) / r) / 64) for r in along]
    np.testing.assert_allclose(std.value_out, expected, rtol=1e-5)


@pytest.mark.parametrize("phi", [jax.nn.gelu, jnp.tanh, jax.nn.leaky_relu])
def test_the_correlation_recursion_of_other_activations(phi):
    p, layers, beta2 = 0.1, 6, 0.3
    std = jax.jit(lambda p: deepscale(64, layers, dropout=p, beta2=beta2, activation=phi))(p)
    kappa = correlation_map(phi, 64 * float(std.feed_forward) ** 2)
    r, along = 0.221 * (1 - p), []
    for _ in range(layers):
        along.append(r)
        r = (1 - beta2) * r + beta2 * (1 - p)
        r = (1 - beta2) * r + beta2 * (1 - p) * float(kappa(r))
    np.testing.assert_allclose(std.correlation, [*along, r], rtol=5e-5)


def test_limits():
    std = deepscale(64, 3, correlation=1.0)
    np.testing.assert_allclose(std.value_out, 1 / 8, rtol=1e-6)  # no dropout, all tokens alike
    np.testing.assert_allclose([std.query_key, std.pooler], 1 / 8, rtol=1e-6)
    still = deepscale(64, 3, dropout=0.2, beta2=0.0)
    np.testing.assert_allclose(still.correlation, 0.221 * 0.8, rtol=1e-6)
    # three embeddings summed, with dropout of 0.2, have second moment 1
    np.testing.assert_allclose(3 * still.embedding**2 / 0.8, 1, rtol=1e-6)


def dropped(key, x, p):
    return jnp.where(jax.random.bernoulli(key, p, x.shape), 0, x / (1 - p))


@pytest.mark.parametrize(
    ("phi", "expansion"),
    [
        (jax.nn.relu, 2),
        (jax.nn.relu, 4),
        *[(phi, 4) for phi in (jax.nn.gelu, jax.nn.silu, jnp.tanh)],
    ],
)
def test_feed_forward_returns_unit_moment(phi, expansion):
    d, p = 256, 0.1
    std = deepscale(d, 1, dropout=p, expansion=expansion, activation=phi).feed_forward
    v = d * float(std) ** 2  # the condition, by another quadrature
    assert expansion * variance_map(phi, v, sigma_w=math.sqrt(v)) == pytest.approx(1 - p, rel=1e-5)

    @jax.jit
    @jax.vmap
    def moment(key):
        x, up, down, drop = jax.random.split(key, 4)
        up = std * jax.random.normal(up, (d, expansion * d))
        down = std * jax.random.normal(down, (expansion * d, d))
        y = phi(jax.random.normal(x, (16, d)) @ up) @ down
        return (dropped(drop, y, p) ** 2).mean()

    assert abs(float(moment(jax.random.split(KEY, 8)).mean()) - 1) < 0.03


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_uniform_attention_returns_its_moment(p):
    d, tokens, r = 128, 16, 0.4
    # the first layer's correlation is correlation * (1 - p)
    std = deepscale(d, 1, dropout=p, correlation=r / (1 - p)).value_out[0]

    @jax.jit
    @jax.vmap
    def moment(key):
        common, own, value, out, drop = jax.random.split(key, 5)
        common = jax.random.normal(common, (1, d))
        x = math.sqrt(r) * common + math.sqrt(1 - r) * jax.random.normal(own, (tokens, d))
        value, out = (std * jax.random.normal(k, (d, d)) for k in (value, out))
        y = jnp.broadcast_to((x @ value).mean(0), x.shape) @ out
        return (dropped(drop, y, p) ** 2).mean()

    expected = (r + (1 - r) / tokens) / r
    measured = moment(jax.random.split(KEY, 200))
    error = float(measured.std()) / math.sqrt(200)
    assert error < 0.03 * expected
    assert abs(float(measured.mean()) - expected) < 4 * error


@pytest.mark.parametrize(("plain", "grows"), [(False, False), (True, True)])
def test_variance_through_192_sublayers(plain, grows):
    d, wire = 64, deepscale_wire(96)
    if plain:
        wire = jax.tree.map(jnp.ones_like, wire)
    std = float(deepscale(d, 1).feed_forward)

    # A draw of the stack is off by about sqrt(2 / d) = 18% (the tokens align), so draw 24.
    @jax.jit
    @jax.vmap
    def stack(key):
        first, rest = jax.random.split(key)

        def block(x, inputs):
            key, numbers = inputs
            up, down = jax.random.split(key)
            up = std * jax.random.normal(up, (d, 4 * d))
            down = std * jax.random.normal(down, (4 * d, d))
            normed = lambda x: x / jnp.sqrt((x**2).mean(-1, keepdims=True))
            x = residual(lambda x: jax.nn.relu(normed(x) @ up) @ down, x, numbers)
            return x, (x**2).mean()

        x = jax.random.normal(first, (4, d))
        return jax.lax.scan(block, x, (jax.random.split(rest, 192), wire))[1]

    moments = np.asarray(stack(jax.random.split(KEY, 24)).mean(0))
    # every block adds 1: the last kernels are independent, so that outputs are uncorrelated
    expected = 1 + np.arange(1, 193) if grows else np.ones(192)
    np.testing.assert_allclose(moments, expected, rtol=0.1)


def test_traced_numbers_compile_once():
    count = 0

    @jax.jit
    def value_out(p, k):
        nonlocal count
        count += 1
        return deepscale(32, 4, dropout=p, k=k).value_out

    for p, k in ((0.1, 1.0), (0.2, 0.5)):
        np.testing.assert_allclose(
            value_out(p, k), deepscale(32, 4, dropout=p, k=k).value_out, rtol=1e-6
        )
    assert count == 1


def test_bad_input():
    for options, message in (
        ({"dropout": 1.0}, "dropout"),
        ({"correlation": 0.0}, "correlation"),
        ({"correlation": -0.1}, "correlation"),
        ({"beta2": 2.0}, "lambda2"),
        ({"k": -1.0}, "beta2"),
        ({"expansion": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            deepscale(16, 2, **options)
