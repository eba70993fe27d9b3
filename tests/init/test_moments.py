"""Gaussian integrals against closed forms, kinked and narrow activations included."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxkit.init.gauss import expect, moments, pool_moment


def relu_above(kink, q):
    """E relu(x - k)^2 and E relu'(x - k)^2, x ~ N(0, q)."""
    s = math.sqrt(q)
    t = kink / s
    return (q + kink**2) * norm.sf(t) - kink * s * norm.pdf(t), norm.sf(t)


@pytest.mark.parametrize("q", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("kink", [0.0, 0.3, -1.7])
def test_kinked_activation(q, kink):
    m = moments(lambda x: jax.nn.relu(x - kink), q)
    m2, d2 = relu_above(kink, q)
    np.testing.assert_allclose(m.m2, m2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(m.d2, d2, rtol=1e-9, atol=1e-15)
    if abs(kink) < 5 * math.sqrt(q):
        assert m.dd2 == math.inf


@pytest.mark.parametrize("q", [1e-2, 1.0, 4.0, 100.0])
def test_clipped_activation(q):
    s = math.sqrt(q)
    m = moments(jax.nn.relu6, q)
    top = 36 * norm.sf(6 / s)
    inside = q * (norm.cdf(6 / s) - 0.5) - 6 * s * norm.pdf(6 / s)
    np.testing.assert_allclose(m.m2, top + inside, rtol=1e-10)
    np.testing.assert_allclose(m.d2, norm.cdf(6 / s) - 0.5, rtol=1e-10)


@pytest.mark.parametrize("width", [1e-3, 0.05, 1.0])
def test_narrow_bump(width):
    m = moments(lambda x: jnp.exp(-(x**2) / (2 * width**2)))
    r2 = 1 / width**2
    m2 = (1 + 2 * r2) ** -0.5
    np.testing.assert_allclose(m.m1, (1 + r2) ** -0.5, rtol=1e-10)
    np.testing.assert_allclose(m.m2, m2, rtol=1e-10)
    np.testing.assert_allclose(m.d2, r2**2 * (1 + 2 * r2) ** -1.5, rtol=1e-10)


def test_gauss_hermite_misses_what_these_find():
    """The negative control: the usual rule is wrong for a kink and loses a narrow bump."""
    x, w = np.polynomial.hermite_e.hermegauss(100)
    rule = lambda f: (w * f(x)).sum() / math.sqrt(2 * math.pi)
    narrow = lambda x: np.exp(-(x**2) / (2 * 0.05**2)) ** 2
    assert rule(narrow) < 0.01 * expect(narrow)
    x, w = np.polynomial.hermite_e.hermegauss(200)
    kinked = lambda x: np.maximum(x, 0) ** 2 - np.maximum(x, 0)
    assert abs(rule(kinked) - (0.5 - norm.pdf(0))) > 1e-4
    np.testing.assert_allclose(expect(kinked), 0.5 - norm.pdf(0), rtol=1e-12)


def test_smooth_closed_forms():
    m = moments(lambda x: jnp.sin(30 * x), 0.01)
    decay = math.exp(-2 * 900 * 0.01)
    np.testing.assert_allclose(m[1:3], [(1 - decay) / 2, 450 * (1 + decay)], rtol=1e-10)
    np.testing.assert_allclose(m.dd2, 30**4 * (1 - decay) / 2, rtol=1e-10)
    m = moments(jax.scipy.special.erf, 2.0)
    np.testing.assert_allclose(m.m2, 2 / math.pi * math.asin(4 / 5), rtol=1e-11)
    np.testing.assert_allclose(m.d2, 4 / math.pi / math.sqrt(1 + 8), rtol=1e-11)
    np.testing.assert_allclose(expect(np.exp, 49.0), math.exp(24.5), rtol=1e-10)


def test_jumps_are_infinite_derivatives():
    assert moments(jax.nn.relu).dd2 == moments(jax.nn.hard_tanh).dd2 == math.inf
    assert moments(jnp.sign)[2:] == (math.inf, math.inf)
    assert moments(lambda x: jnp.where(x > 0.3, x, 0.0)).d2 == math.inf
    for smooth in (jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.softplus):
        assert math.isfinite(moments(smooth).dd2)
    elu = moments(jax.nn.elu)  # the second derivative jumps: it is still square integrable
    np.testing.assert_allclose(elu.dd2, math.exp(2) * norm.cdf(-2), rtol=1e-11)


def test_pool_moments():
    assert pool_moment(1) == pytest.approx(1, abs=1e-12)
    assert pool_moment(2) == pytest.approx(1, abs=1e-12)
    assert pool_moment(3) == pytest.approx(1 + math.sqrt(3) / (2 * math.pi), rel=1e-12)
    assert pool_moment(2, extreme="max_abs") == pytest.approx(1 + 2 / math.pi, rel=1e-11)
    assert pool_moment(2, extreme="min_abs") == pytest.approx(1 - 2 / math.pi, rel=1e-11)
    # E max(|Z_1|, |Z_2|, |Z_3|): the integral of 1 - (2 P(t) - 1)^3, and likewise the least
    t = np.linspace(0, 12, 200_001)
    inside = 2 * norm.cdf(t) - 1
    largest, least = np.trapezoid([1 - inside**3, (1 - inside) ** 3], t)
    assert pool_moment(3, lambda z: z, extreme="max_abs") == pytest.approx(largest, rel=1e-8)
    assert pool_moment(3, lambda z: z, extreme="min_abs") == pytest.approx(least, rel=1e-8)
    assert pool_moment(3, lambda z: z) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-9)
    with pytest.raises(ValueError, match="k >= 1"):
        pool_moment(0)
    with pytest.raises(ValueError, match="extreme"):
        pool_moment(2, extreme="median")


def test_computed_while_tracing():
    @jax.jit
    def f(x):
        return x * moments(jnp.tanh).m2

    assert float(f(1.0)) == np.float32(moments(jnp.tanh).m2)
    out = jax.vmap(jax.grad(lambda x: x * moments(jnp.tanh).m2))(jnp.ones(2))
    assert out.dtype == jnp.float32 and float(out[0]) == np.float32(moments(jnp.tanh).m2)


def test_functions_of_numpy_and_of_low_precision():
    assert moments(np.tanh, order=0).m2 == pytest.approx(moments(jnp.tanh).m2, rel=1e-13)
    assert math.isnan(moments(np.tanh, order=0).d2)
    low = moments(lambda x: jnp.tanh(x.astype(jnp.float32)))
    assert low.d2 == pytest.approx(moments(jnp.tanh).d2, rel=1e-5)
    with pytest.raises(TypeError, match="cannot be differentiated"):
        moments(np.tanh)


def test_bad_input():
    with pytest.raises(ValueError, match="mixes its entries"):
        moments(jax.nn.softmax)
    with pytest.raises(ValueError, match="maps shape"):
        moments(jnp.sum)
    with pytest.raises(ValueError, match="not finite"):
        moments(lambda x: jnp.exp(x**2))
    with pytest.raises(ValueError, match="does not converge near x = "):
        moments(lambda x: jnp.sqrt(jnp.abs(x)), order=1)
    for q in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            moments(jnp.tanh, q)
    with pytest.raises(TypeError, match="closes over a traced value"):
        jax.jit(lambda w: moments(lambda x: jnp.sin(w * x)).m2)(1.0)
    with pytest.raises(TypeError, match="not a traced value"):
        jax.jit(lambda q: moments(jnp.tanh, q).m2)(1.0)
    with pytest.raises(TypeError, match="real activation"):
        moments(lambda x: x + 1j)
