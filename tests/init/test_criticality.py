"""Critical points against closed forms and published values; the kernel against real networks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.criticality import (
    correlation_rate,
    criticality,
    edge_of_chaos,
    finite_width,
    fluctuation,
    susceptibilities,
    width_fluctuation,
)
from jaxkit.init.gauss import expect, moments
from jaxkit.init.kernel import (
    class_fractions,
    correlation_map,
    guessing_bias,
    propagate,
    variance_map,
)
from jaxkit.init.pseudo_iid import orthogonal

ROOT = math.sqrt(2)
normal = lambda sigma_w: jax.nn.initializers.variance_scaling(sigma_w**2, "fan_in", "normal")


# --------------------------------------------------------------------------- edge of chaos


def test_edge_of_chaos_of_homogeneous_activations():
    point = edge_of_chaos(jax.nn.relu)
    np.testing.assert_allclose(point[:2], (0.0, 1.41421356), rtol=1e-8)
    leaky = edge_of_chaos(lambda x: jax.nn.leaky_relu(x, 0.2))
    np.testing.assert_allclose(leaky.sigma_w, math.sqrt(2 / 1.04), rtol=1e-9)
    assert edge_of_chaos(lambda x: x).sigma_w == pytest.approx(1)


@pytest.mark.parametrize(
    ("phi", "sigma_b", "q", "sigma_w", "beta"),
    [
        (jnp.tanh, 0.1, 0.2733, 1.1934, 16.64),
        (jnp.tanh, 0.2, 0.5121, 1.3042, 7.08),
        (jnp.tanh, 0.3, 0.7635, 1.3956, 4.28),
        (jax.nn.silu, 1.0, 39.39459, 1.40251, None),
        (jax.nn.elu, 0.2, 1.1069, 1.2293, None),
    ],
)
def test_edge_of_chaos_of_smooth_activations(phi, sigma_b, q, sigma_w, beta):
    point = edge_of_chaos(phi, sigma_b)
    np.testing.assert_allclose((point.q, point.sigma_w), (q, sigma_w), atol=6e-5)
    m = moments(phi, point.q)
    # the definition, and the plain iteration's residual
    assert point.sigma_w**2 * m.d2 == pytest.approx(1, abs=1e-12)
    kept = variance_map(phi, point.q, sigma_w=point.sigma_w, sigma_b=sigma_b)
    assert kept == pytest.approx(point.q, rel=1e-10)
    if beta:
        assert correlation_rate(phi, point.q) == pytest.approx(beta, abs=0.006)


def test_no_edge_of_chaos():
    with pytest.raises(ValueError, match="no edge of chaos with sigma_b > 0"):
        edge_of_chaos(jax.nn.relu, 0.1)
    with pytest.raises(ValueError, match=r"diverges \(last q ="):
        edge_of_chaos(jax.nn.softplus, 0.1)
    with pytest.raises(ValueError, match="squared slope is inf"):
        edge_of_chaos(jnp.sign, 0.1)
    with pytest.raises(ValueError, match="relu-like"):
        correlation_rate(jax.nn.relu, 1.0)
    with pytest.raises(ValueError, match="linear"):
        correlation_rate(lambda x: 2 * x, 1.0)
    with pytest.raises(ValueError, match="sigma_b >= 0"):
        edge_of_chaos(jnp.tanh, -0.1)


def settled(phi, point, start, layers=3000):
    """The variance after many layers with the weights held, by a sum over a grid in float64."""
    z = np.linspace(-9, 9, 2001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()

    def layer(q, _):
        return point[0] ** 2 + point[1] ** 2 * (weights @ phi(jnp.sqrt(q) * z) ** 2), None

    with jax.enable_x64(True):
        return float(jax.jit(lambda q: jax.lax.scan(layer, q, length=layers)[0])(start))


@pytest.mark.parametrize(
    ("phi", "sigma_b"),
    [
        *[(phi, sigma_b) for phi in (jnp.tanh, jnp.sin, jax.nn.elu) for sigma_b in (0.0, 0.1, 0.5)],
        *[(phi, sigma_b) for phi in (jax.nn.selu, jax.nn.soft_sign) for sigma_b in (0.0, 0.2)],
        *[(jax.nn.hard_tanh, 0.0), (jax.nn.relu6, 0.1), (lambda x: jnp.exp(-(x**2)), 0.3)],
        *[(jax.nn.gelu, 0.45), (jax.nn.silu, 0.8), (jax.nn.mish, 0.35), (jax.nn.sigmoid, 1.0)],
    ],
)
def test_the_variance_settles_at_the_edge_of_chaos(phi, sigma_b):
    point = edge_of_chaos(phi, sigma_b)
    if point.q > 0:
        for start in (1.0, 1.3 * point.q):
            assert settled(phi, point, start) == pytest.approx(point.q, rel=1e-2)
    else:
        assert settled(phi, point, 1.0) < 0.1


@pytest.mark.parametrize("phi", [jax.nn.gelu, jax.nn.silu, jax.nn.mish, jax.nn.hard_swish])
def test_no_stable_edge_of_chaos_below_the_critical_point(phi):
    at = criticality(phi)
    np.testing.assert_allclose(edge_of_chaos(phi, 1.001 * at.sigma_b), at, rtol=0.01)
    for sigma_b in (0.0, 0.1, 0.999 * at.sigma_b):
        with pytest.raises(ValueError, match=r"no stable edge .*chi_par = 1\.\d+ .*criticality\("):
            edge_of_chaos(phi, sigma_b)
    # what such a point does: the fixed points of the textbooks at sigma_b = 0 and 0.2
    assert settled(phi, (0.0, 1 / abs(float(jax.grad(phi)(0.0)))), 1.0, layers=60) > 1e4
    with pytest.raises(ValueError, match="no stable edge"):  # stable near 0, but not up to 1
        edge_of_chaos(lambda x: x - x**3 + x**5)


def test_the_slope_at_a_kink_is_that_of_both_sides():
    left, right = 1.7580993408473766, 1.0507009873554805
    expected = 1 / math.sqrt((left**2 + right**2) / 2)
    for point in (edge_of_chaos(jax.nn.selu), criticality(jax.nn.selu)):
        np.testing.assert_allclose(point, (0.0, expected, 0.0), rtol=1e-8)
    tiny = moments(jax.nn.selu, 1e-14, order=1)  # the limit that it is
    np.testing.assert_allclose(tiny.d2**-0.5, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="vanishes"):
        edge_of_chaos(lambda x: jnp.tanh(x**2))


# ------------------------------------------------------------------------ correlation map


def test_correlation_maps_in_closed_form():
    c = np.linspace(-1, 1, 21)
    theta = np.arccos(c)
    relu = correlation_map(jax.nn.relu, 2.0, sigma_w=ROOT)
    np.testing.assert_allclose(relu(c), (np.sin(theta) + (np.pi - theta) * c) / np.pi, atol=1e-12)
    q, w0 = 0.7, 3.0
    sine = correlation_map(lambda x: jnp.sin(w0 * x), q)
    closed = np.sinh(w0**2 * q * c) / np.sinh(w0**2 * q)
    np.testing.assert_allclose(sine(c), closed, atol=1e-11)
    erf = correlation_map(jax.scipy.special.erf, q, sigma_w=1.1, sigma_b=0.3)
    kernel = lambda c: 0.09 + 1.21 * 2 / np.pi * np.arcsin(2 * q * c / (1 + 2 * q))
    np.testing.assert_allclose(erf(c), kernel(c) / kernel(1.0), atol=1e-11)
    with pytest.raises(ValueError, match="lies in"):
        relu(1.5)


def test_correlation_map_of_a_shifted_kink():
    """The slope at c = 1 is chi_1 and the value at c = 0 is the squared mean."""
    phi, q = lambda x: jax.nn.relu(x - 0.3), 1.0
    m = moments(phi, q, order=1)
    f = correlation_map(phi, q)
    np.testing.assert_allclose(f(0.0), m.m1**2 / m.m2, rtol=1e-9)
    np.testing.assert_allclose((1 - f(1 - 1e-8)) / 1e-8, q * m.d2 / m.m2, rtol=1e-4)


def test_relu_correlations_converge_as_one_over_depth_squared():
    f, c, seen = correlation_map(jax.nn.relu, 1.0, sigma_w=ROOT), 0.1, []
    for layer in range(1, 20001):
        c = f(c)
        if layer in (100, 1000, 20000):
            seen.append(float(layer**2 * (1 - c)))
    np.testing.assert_allclose(seen, [35.61, 43.11, 44.33], atol=0.01)
    np.testing.assert_allclose(seen[-1], 9 * np.pi**2 / 2, rtol=3e-3)


def test_smooth_correlations_converge_as_one_over_depth():
    point = edge_of_chaos(jnp.tanh, 0.2)
    beta = correlation_rate(jnp.tanh, point.q)
    path = propagate(jnp.tanh, 10000, sigma_w=point.sigma_w, sigma_b=0.2, q=point.q, c=0.1)
    scaled = np.arange(10001) * (1 - path.c)
    np.testing.assert_allclose(scaled[[100, 1000, 10000]], [7.28, 7.17, 7.10], atol=0.006)
    np.testing.assert_allclose(scaled[-1], beta, rtol=4e-3)
    np.testing.assert_allclose(path.q, point.q, rtol=1e-9)


def test_kernel_and_jacobian_of_a_wide_network():
    n, depth, sigma_w, sigma_b = 1000, 20, 1.5, 0.3

    def layer(z, key):
        a, b = jax.random.split(key)
        w, bias = normal(sigma_w)(a, (n, n)), sigma_b * jax.random.normal(b, (n,))
        slope = jnp.square(1 - jnp.tanh(z[0]) ** 2)
        jacobian = (jnp.square(w) * slope[:, None]).sum() / n  # ||J||_F^2 / n
        z = jnp.tanh(z) @ w + bias
        return z, (jnp.square(z).mean(), (z[0] * z[1]).mean(), jacobian)

    def draw(key):
        first, rest = jax.random.split(key)
        x = jax.random.normal(first, (2, n))
        z = jnp.stack([x[0], 0.6 * x[0] + 0.8 * x[1]])
        return jax.lax.scan(layer, z, jax.random.split(rest, depth))[1]

    q, k, chi = jax.jit(lambda keys: jax.lax.map(draw, keys))(
        jax.random.split(jax.random.key(0), 6)
    )
    q, k, chi = (x.mean(0) for x in (q, k, chi))
    path = propagate(jnp.tanh, depth, sigma_w=sigma_w, sigma_b=sigma_b, q=1.0, c=0.6)
    np.testing.assert_allclose(q[-1], path.q[-1], rtol=0.05)
    np.testing.assert_allclose(k[-1] / q[-1], path.c[-1], atol=0.05)
    chi_1 = susceptibilities(jnp.tanh, path.q[-1], sigma_w=sigma_w).perpendicular
    np.testing.assert_allclose(chi[-5:].mean(), chi_1, rtol=0.05)


@pytest.mark.parametrize("sigma_w", [0.8, None, 2.5])
def test_gradients_grow_by_chi_a_layer(sigma_w):
    n, depth = 256, 50
    sigma_b = 0.1
    point = edge_of_chaos(jnp.tanh, sigma_b)
    sigma_w = sigma_w or point.sigma_w
    q = propagate(jnp.tanh, 300, sigma_w=sigma_w, sigma_b=sigma_b).q[-1]

    def draw(key):
        keys = jax.random.split(key, 4)
        kernels = jax.vmap(lambda k: normal(sigma_w)(k, (n, n)))(jax.random.split(keys[0], depth))
        biases = sigma_b * jax.random.normal(keys[1], (depth, n))
        z, probe = jnp.sqrt(q) * jax.random.normal(keys[2], (n,)), jax.random.normal(keys[3], (n,))

        def loss(shifts):
            step = lambda z, a: (jnp.tanh(z) @ a[0] + a[1] + a[2], None)
            return jax.lax.scan(step, z, (kernels, biases, shifts))[0] @ probe

        grads = jax.grad(loss)(jnp.zeros((depth, n)))
        return jnp.square(grads[0]).sum() / jnp.square(grads[-1]).sum()

    # one draw varies by e or so: a mean over draws
    keys = jax.random.split(jax.random.key(1), 12)
    ratio = float(jax.jit(lambda keys: jax.lax.map(draw, keys))(keys).mean())
    chi = susceptibilities(jnp.tanh, q, sigma_w=sigma_w).perpendicular
    if sigma_w == point.sigma_w:
        assert chi == pytest.approx(1, abs=1e-6)
    else:
        assert chi == pytest.approx({0.8: 0.6099, 2.5: 1.6045}[sigma_w], abs=1e-3)
    assert 1 / 3 < ratio / chi ** (depth - 1) < 3


# ------------------------------------------------------------------------------ criticality


def test_universality_classes():
    np.testing.assert_allclose(criticality(jax.nn.relu)[:2], (0, ROOT))
    for phi in (jnp.tanh, jnp.sin, jax.nn.hard_tanh, jax.nn.elu, jax.nn.soft_sign):
        assert criticality(phi) == (0.0, 1.0, 0.0)
        near = susceptibilities(phi, 1e-8)  # the limit that the point stands for
        np.testing.assert_allclose(near, (1, 1), rtol=1e-3)
    np.testing.assert_allclose(criticality(lambda x: jnp.tanh(2 * x)).sigma_w, 0.5)


@pytest.mark.parametrize(
    ("phi", "sigma_b2", "sigma_w2"),  # section 5.3.4 of the book
    [(jax.nn.gelu, 0.17292, 1.98305), (jax.nn.silu, 0.55514, 1.98800)],
)
def test_half_stable_class(phi, sigma_b2, sigma_w2):
    point = criticality(phi)
    np.testing.assert_allclose(
        (point.sigma_b**2, point.sigma_w**2), (sigma_b2, sigma_w2), atol=2e-4
    )
    chi = susceptibilities(phi, point.q, sigma_w=point.sigma_w)
    np.testing.assert_allclose(chi, (1, 1), atol=1e-9)
    kept = variance_map(phi, point.q, sigma_w=point.sigma_w, sigma_b=point.sigma_b)
    assert kept == pytest.approx(point.q, rel=1e-9)


@pytest.mark.parametrize("phi", [jax.nn.sigmoid, jax.nn.softplus])
def test_no_critical_point(phi):
    with pytest.raises(ValueError, match=r"no critical point: .*scale-inv.*K\* = 0.*half-stable"):
        criticality(phi)


@pytest.mark.parametrize("phi", [jnp.tanh, jax.nn.relu, jax.nn.gelu])
@pytest.mark.parametrize("q", [0.3, 2.0])
def test_parallel_susceptibility_is_the_derivative_of_the_variance_map(phi, q):
    # d/dq E phi(sqrt(q) z)^2 = E phi phi' z / sqrt(q), by automatic differentiation inside
    slope = lambda x: 2 * jax.jvp(phi, (x,), (jnp.ones_like(x),))[1] * phi(x) * x / (2 * q)
    chi = susceptibilities(phi, q, sigma_w=1.3).parallel
    np.testing.assert_allclose(chi, 1.69 * expect(slope, q), rtol=1e-8)


def test_the_kernel_of_tanh_decays_as_one_over_twice_the_depth():
    path = propagate(jnp.tanh, 2000, sigma_w=1.0, q=1.0, c=1.0)
    scaled = 2 * np.arange(2001) * path.q
    np.testing.assert_allclose(scaled[[100, 2000]], [1.0138, 1.0013], atol=2e-4)


# ----------------------------------------------------------------------------- finite width


def simulated_ratio(phi, sigma_w, n, depth, draws):
    """E r^2 / (E r)^2 of r = mean phi(z)^2 * sigma_w^2, over draws."""

    @jax.jit
    def sample(key):
        def layer(h, key):
            w = jax.random.normal(key, (draws // 40, n, n)) * (sigma_w / math.sqrt(n))
            return phi(jnp.einsum("di,dij->dj", h, w)), None

        h = jnp.ones((draws // 40, n)) / sigma_w
        h, _ = jax.lax.scan(layer, h, jax.random.split(key, depth))
        return jnp.square(h).mean(-1)

    r = np.concatenate([sample(k) for k in jax.random.split(jax.random.key(0), 40)])
    r = r.astype(np.float64)
    return (r**2).mean() / r.mean() ** 2


def test_linear_fluctuations():
    phi = lambda x: x
    assert fluctuation(phi, [64] * 16) == pytest.approx((1 + 2 / 64) ** 16)
    assert fluctuation(phi, [32, 16]) == pytest.approx((1 + 2 / 32) * (1 + 2 / 16))
    np.testing.assert_allclose(
        simulated_ratio(phi, 1.0, 32, 8, 8000), fluctuation(phi, [32] * 8), rtol=0.06
    )


def test_relu_fluctuations():
    assert fluctuation(jax.nn.relu, [64] * 8) == pytest.approx((1 + 5 / 64) ** 8)
    np.testing.assert_allclose(
        simulated_ratio(jax.nn.relu, ROOT, 32, 4, 12000), (1 + 5 / 32) ** 4, rtol=0.06
    )


@pytest.mark.slow
def test_relu_fluctuations_at_width_64():
    simulated = simulated_ratio(jax.nn.relu, ROOT, 64, 8, 40000)
    np.testing.assert_allclose(simulated, 1.8254, rtol=0.03)


def test_first_order_fluctuations():
    widths = [10**6] * 5
    out = finite_width(jax.nn.relu, widths, sigma_w=ROOT)
    np.testing.assert_allclose(out.kernel, 1.0, rtol=1e-9)
    np.testing.assert_allclose(out.variance[-1], fluctuation(jax.nn.relu, widths) - 1, rtol=1e-4)
    out = finite_width(jnp.tanh, [100] * 200, sigma_w=1.0)
    nu = out.variance[-1] / out.kernel[-1] ** 2 * 100 / 200
    np.testing.assert_allclose(nu, 2 / 3, rtol=0.02)


def test_bad_widths():
    for widths in (64, [64, 0], [-1]):
        with pytest.raises(ValueError, match="width"):
            fluctuation(jax.nn.relu, widths)
    with pytest.raises(ValueError, match="not scale-invariant"):
        fluctuation(jnp.tanh, [8])


# ------------------------------------------------------- orthogonal against Gaussian weights


@functools.cache
def ensemble(kind, phi, depth=40, n=30, draws=200):
    draw = orthogonal() if kind == "orthogonal" else normal(1.0)

    @jax.jit
    @jax.vmap
    def sample(key):
        ws = jax.vmap(lambda k: draw(k, (n, n), jnp.float32))(jax.random.split(key, depth))
        step = lambda z, w: ((out := phi(z) @ w), out)
        return jax.lax.scan(step, jnp.linspace(-1, 1, n), ws)[1]

    return sample(jax.random.split(jax.random.key(0), draws))


def identity(x):
    return x


def test_orthogonal_linear_networks_do_not_fluctuate():
    z = ensemble("orthogonal", identity, draws=20)
    assert float(width_fluctuation(z).max()) < 1e-6


def test_orthogonal_weights_stop_the_growth_of_fluctuations():
    gaussian = np.asarray(width_fluctuation(ensemble("normal", jnp.tanh)))
    isometric = np.asarray(width_fluctuation(ensemble("orthogonal", jnp.tanh)))
    assert gaussian[19] / isometric[19] > 20
    assert gaussian[39] > 1.3 * gaussian[19] > 1.3**2 * gaussian[9]
    assert isometric.max() < 0.5 and isometric[39] < isometric[4]
    with pytest.raises(ValueError, match="draws >= 2"):
        width_fluctuation(jnp.ones((1, 3)))


@pytest.mark.slow
def test_tangent_kernels_of_orthogonal_networks_saturate():
    """The empirical NTK's relative spread over draws, depth 40 against 20, grows only for iid."""
    n, x = 30, jnp.linspace(-1, 1, 30)

    def spread(draw, depth):
        def tangent(key):
            ws = jax.vmap(lambda k: draw(k, (n, n), jnp.float32))(jax.random.split(key, depth))

            def f(ws):
                return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0][0]

            # per unit of depth, each weight's gradient times its own scale 1/n
            return jnp.square(jax.grad(f)(ws)).sum() / n

        k = jax.jit(jax.vmap(tangent))(jax.random.split(jax.random.key(0), 400))
        return float(k.std() / k.mean())

    isometric = np.array([spread(orthogonal(), depth) for depth in (20, 40)])
    gaussian = np.array([spread(normal(1.0), depth) for depth in (20, 40)])
    # 0.105 and 0.08, up to 7 % or so each: bounded, a seventh of that of Gaussian weights and less
    assert 0.6 < isometric[1] / isometric[0] < 1.0 < 1.1 < gaussian[1] / gaussian[0]
    assert isometric.max() < 0.13
    assert gaussian[0] > 6 * isometric[0] and gaussian[1] > 10 * isometric[1]


# --------------------------------------------------------------------- initial guessing bias


def fractions(phi, layers, draws, n=300, d=200, head_sign=1.0):
    x = jax.random.normal(jax.random.key(7), (500, d))

    @jax.jit
    def sample(key):
        keys = jax.random.split(key, layers + 1)
        h = x
        for k in keys[:-1]:
            h = phi(h @ normal(ROOT)(k, (h.shape[1], n)))
        return class_fractions(head_sign * (h @ jax.random.normal(keys[-1], (n, 1))))[0]

    return np.asarray(jax.lax.map(sample, jax.random.split(jax.random.key(8), draws)))


def test_guessing_bias_in_closed_form():
    one = guessing_bias(jax.nn.relu, 1)
    np.testing.assert_allclose(one.correlation, 1 / np.pi, rtol=1e-9)
    np.testing.assert_allclose(one.gamma, 1 / (np.pi - 1), rtol=1e-9)
    np.testing.assert_allclose(one.variance, 0.0516, atol=5e-5)
    three = guessing_bias(jax.nn.relu, 3)
    np.testing.assert_allclose((three.gamma, three.variance), (1.53, 0.1034), atol=1e-3)
    assert abs(guessing_bias(jnp.tanh, 4, sigma_w=1.5).variance) < 1e-12
    with pytest.raises(ValueError, match="hidden layers"):
        guessing_bias(jax.nn.relu, 0)


@pytest.mark.parametrize("layers", [1, 3])
def test_guessing_bias_of_relu_networks(layers):
    f = fractions(jax.nn.relu, layers, 300)
    expected = guessing_bias(jax.nn.relu, layers).variance
    # 300 draws: the variance is known to 8 % or so
    np.testing.assert_allclose(f.var(), expected, rtol=0.2)


def test_unbiased_networks():
    assert fractions(jnp.tanh, 1, 100).var() < 0.002
    centred = lambda z: jax.nn.relu(z) - z.std() / math.sqrt(2 * math.pi)
    assert fractions(centred, 1, 100).var() < 0.003


def test_negating_the_head_swaps_the_classes():
    f = fractions(jax.nn.relu, 1, 5)
    np.testing.assert_allclose(fractions(jax.nn.relu, 1, 5, head_sign=-1.0), 1 - f, atol=1e-6)


def test_class_fractions():
    logits = jnp.array([[[3.0, 1, 2], [1, 2, 0], [0, 1, 9], [0, 1, 7]], [[0.0, 0, 0]] * 4])
    f = np.asarray(jax.jit(class_fractions)(logits))
    np.testing.assert_array_equal(f[0], [0.25, 0.25, 0.5])
    assert np.isnan(f[1]).all()
    with pytest.warns(UserWarning, match="zero-initialized head"):
        np.testing.assert_array_equal(class_fractions(logits), f)
    assert class_fractions(logits[0].astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(ValueError, match="examples, classes"):
        class_fractions(jnp.ones(3))


def test_ties_are_left_out_of_class_fractions():
    logits = jnp.array([[3.0, 1, 2], [2, 2, 0], [0, 1, 9], [0, 0, 7], [4, 4, 4], [1, 5, 2]])
    np.testing.assert_array_equal(class_fractions(logits), [0.25, 0.25, 0.5])
    np.testing.assert_array_equal(class_fractions(logits[:, :1]), [1, 0])  # 0 has no sign
    assert np.isnan(class_fractions(jnp.ones((3, 2)))).all()
    assert np.isnan(class_fractions(logits.at[5, 0].set(jnp.nan))).all()
    # devices with different numbers of ties count their examples alike
    both = jax.pmap(lambda x: class_fractions(x, axis_name="data"), "data")
    np.testing.assert_array_equal(
        both(logits[2:].reshape(2, 2, 3))[0], np.float32([0, 1 / 3, 2 / 3])
    )


def test_propagate_bad_input():
    with pytest.raises(ValueError, match=r"\|c\| <= 1"):
        propagate(jnp.tanh, 3, sigma_w=1.0, c=2.0)
    with pytest.raises(ValueError, match="sigma_w > 0"):
        propagate(jnp.tanh, 3, sigma_w=0.0)
    with pytest.raises(ValueError, match="dies at layer 1"):
        propagate(lambda x: 0.0 * x, 3, sigma_w=1.0)
