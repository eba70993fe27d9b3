"""Gain rules: closed forms, flat signals through deep stacks, sound bounds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.gain import balanced_sigma, gain, input_gain, maxout, maxout_range, vi3nr
from jaxkit.init.gauss import pool_moment
from jaxkit.init.graph import (
    architecture_aware,
    in_degrees,
    learning_rate_scale,
    path_lengths,
)
from jaxkit.init.interval import affine_bounds, ibp, ibp_regularizer

S = 0.05
HE = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def bump(x):
    return jnp.exp(-(x**2) / (2 * S**2))


# ------------------------------------------------------------------------------------- gains


@pytest.mark.parametrize(
    ("phi", "value"),
    [
        (jax.nn.relu, math.sqrt(2)),
        (lambda x: x, 1.0),
        (jnp.tanh, 1.59254),
        (jnp.sin, 1.52087),
        (functools.partial(jax.nn.gelu, approximate=False), 1.53353),
        (jax.nn.silu, 1.67653),
    ],
)
def test_forward_gains(phi, value):
    assert gain(phi) == pytest.approx(value, abs=2e-5)


def test_gains_in_closed_form():
    assert gain(jax.nn.relu, 17.0) == pytest.approx(math.sqrt(2))
    assert gain(jax.nn.relu, rule="backward") == pytest.approx(math.sqrt(2))
    assert gain(jax.nn.relu, rule="centered") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)))
    w0, sp = 30.0, 0.02
    second = (1 - math.exp(-2 * w0**2 * sp**2)) / 2
    assert gain(lambda x: jnp.sin(w0 * x), sp) == pytest.approx(sp / math.sqrt(second), rel=1e-9)
    for r in (0.7, 3.0):
        sp = r * S
        assert gain(bump, sp) == pytest.approx(sp * (1 + 2 * r**2) ** 0.25, rel=1e-6)
        ratio = (gain(bump, sp) / gain(bump, sp, rule="backward")) ** 2
        assert ratio == pytest.approx(r**4 / (1 + 2 * r**2), rel=1e-6)
    assert balanced_sigma(bump) == pytest.approx(S * math.sqrt(1 + math.sqrt(2)), rel=1e-6)
    assert balanced_sigma(jax.nn.relu) == 1.0


@pytest.mark.parametrize(
    ("ratio", "growth"), [(math.sqrt(1 + math.sqrt(2)), 1.0), (3.0, 2.065), (0.7, 0.348)]
)
def test_bump_networks_keep_activations_and_where_balanced_gradients(ratio, growth):
    n, depth, sigma = 512, 8, ratio * S
    init = vi3nr(bump, sigma, distribution="normal")
    keys = jax.random.split(jax.random.key(0), depth)
    kernels = jax.vmap(lambda k: init(k, (n, n), jnp.float32))(keys)

    def forward(z, shifts):
        step = lambda z, ws: ((out := bump(z) @ ws[0] + ws[1]), out)
        return jax.lax.scan(step, z, (kernels, shifts))

    z = sigma * jax.random.normal(jax.random.key(1), (64, n))
    probe = jax.random.normal(jax.random.key(2), (64, n))
    shifts = jnp.zeros((depth, 64, n))
    _, zs = jax.jit(forward)(z, shifts)
    np.testing.assert_allclose(zs.std((1, 2)) / sigma, 1.0, atol=0.1)
    grads = jax.jit(jax.grad(lambda s: (forward(z, s)[0] * probe).sum()))(shifts)
    stds = np.asarray(grads.std((1, 2)))
    per_layer = (stds[0] / stds[-1]) ** (1 / (depth - 1))
    chi = ratio**4 / (1 + 2 * ratio**2)
    np.testing.assert_allclose(per_layer, math.sqrt(chi), rtol=0.05)
    np.testing.assert_allclose(math.sqrt(chi), growth, atol=2e-3)


@pytest.mark.parametrize(("scale", "mean"), [(20.0, 5.0), (1.0, 5.0)])
def test_vi3nr_keeps_preactivations_at_one(scale, mean):
    """Inputs with a mean, and with one that outweighs their deviation."""
    n, depth, init = 256, 8, vi3nr(jnp.tanh)
    x = scale * jax.random.normal(jax.random.key(1), (64, n)) + mean
    rms = math.sqrt(float(x.mean()) ** 2 + float(x.var()))
    assert float(input_gain(x, 2.0)) == pytest.approx(2 / rms, rel=1e-5)
    first = jax.nn.initializers.variance_scaling(float(input_gain(x)) ** 2, "fan_in", "uniform")

    @jax.jit
    @jax.vmap
    def moments(key):
        keys = jax.random.split(key, depth)
        z = x @ first(keys[0], (n, n))
        layer = lambda z, key: ((z := jnp.tanh(z) @ init(key, (n, n), jnp.float32)), z)
        later = jax.lax.scan(layer, z, keys[1:])[1]
        return jnp.square(jnp.concatenate([z[None], later])).mean((1, 2))

    stds = np.sqrt(moments(jax.random.split(jax.random.key(0), 8)).mean(0))
    np.testing.assert_allclose(stds, 1.0, atol=0.07)
    w = np.asarray(init(jax.random.key(0), (n, n)))
    assert np.abs(w).max() <= math.sqrt(3) * gain(jnp.tanh) / 16


def test_gain_bad_input():
    for sigma in (0.0, -1.0):
        with pytest.raises(ValueError, match="sigma must be positive"):
            gain(jnp.tanh, sigma)
    with pytest.raises(ValueError, match="numerically zero at sigma"):
        gain(lambda x: jax.nn.relu(x - 100.0))
    with pytest.raises(ValueError, match="constant"):
        gain(lambda x: 0 * x + 1, rule="centered")
    with pytest.raises(ValueError, match="flat"):
        gain(jnp.sign, rule="backward")
    with pytest.raises(ValueError, match="rules are"):
        gain(jnp.tanh, rule="sideways")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float inputs"):
        input_gain(jnp.arange(4))
    with pytest.raises(ValueError, match="all zero"):
        input_gain(jnp.zeros(4))
    for sigma in (0.0, -1.0, jnp.zeros(()), np.float32(-2)):
        with pytest.raises(ValueError, match="sigma must be positive"):
            input_gain(jnp.ones(4), sigma)
    zero = jnp.zeros(())
    assert jnp.isfinite(jax.jit(lambda s: input_gain(jnp.ones(4), s))(zero))  # traced: not known
    with pytest.raises(ValueError, match="no sigma in"):
        balanced_sigma(jnp.tanh)


# ------------------------------------------------------------------------------------ maxout


def units(z, rank):
    return z.reshape(*z.shape[:-1], -1, rank).max(-1)


def test_maxout_constants():
    constants = [1 / pool_moment(k) for k in range(1, 7)]
    np.testing.assert_allclose(constants, [1.0, 1.0, 0.78391, 0.64461, 0.55555, 0.49462], atol=1e-5)
    assert 1 / pool_moment(20) == pytest.approx(0.26573, abs=1e-5)
    ranges = [maxout_range(k) for k in (2, 3, 4, 5)]
    expected = [(0.61102, 2.7519), (0.47559, 5.18678), (0.40482, 8.28487), (0.36052, 12.037)]
    np.testing.assert_allclose(ranges, expected, rtol=2e-5)
    for k, (low, high) in zip((2, 3, 4, 5), ranges, strict=True):
        assert low < constants[k - 1] < high


def test_maxout_variance():
    w = maxout(5)(jax.random.key(0), (300, 500))
    assert float(w.var()) * 300 == pytest.approx(0.55555, rel=0.02)
    w = maxout(5, pool=4)(jax.random.key(0), (3, 3, 32, 500))
    assert float(w.var()) * 288 == pytest.approx(0.26573, rel=0.02)
    assert maxout(2)(jax.random.key(0), (4, 4), jnp.bfloat16).dtype == jnp.bfloat16


def test_maxout_networks_neither_die_nor_explode():
    n, rank, depth = 256, 5, 20

    def stack(init):
        def run(key):
            def layer(h, k):
                h = units(h @ init(k, (n, n * rank), jnp.float32), rank)
                return h, jnp.square(h).mean()

            return jax.lax.scan(layer, jnp.ones(n), jax.random.split(key, depth))[1]

        return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8)))

    flat = np.exp(np.log(stack(maxout(rank))).mean(0))
    assert ((flat > 0.5) & (flat < 1.4)).all()
    loud = stack(jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
    growth = np.exp(np.log(loud[:, -1] / loud[:, 0]).mean() / (depth - 1))
    assert growth == pytest.approx(1.8, abs=0.06)


@pytest.mark.slow
def test_deep_maxout_learns_digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = jnp.asarray((x - x.mean()) / x.std(), jnp.float32)
    n, rank, depth = 32, 5, 20
    head = jax.nn.initializers.lecun_normal()

    def train(init):
        keys = jax.random.split(jax.random.key(0), depth + 2)
        params = {
            "in": init(keys[0], (64, n * rank)),
            "hidden": jnp.stack([init(k, (n, n * rank)) for k in keys[2:]]),
            "out": head(keys[1], (n, 10)),
        }

        def loss(p):
            h = units(x @ p["in"], rank)
            h = jax.lax.scan(lambda h, w: (units(h @ w, rank), None), h, p["hidden"])[0]
            logp = jax.nn.log_softmax(h @ p["out"])
            return -jnp.take_along_axis(logp, y[:, None], 1).mean()

        def step(p, _):
            value, g = jax.value_and_grad(loss)(p)
            norm = jnp.sqrt(sum(jnp.square(v).sum() for v in jax.tree.leaves(g)))
            return jax.tree.map(lambda a, b: a - 0.05 * b / jnp.maximum(1, norm), p, g), value

        return np.asarray(jax.jit(lambda p: jax.lax.scan(step, p, length=250)[1])(params))

    good = train(maxout(rank))
    dead = train(jax.nn.initializers.variance_scaling(0.1, "fan_in", "normal"))
    assert good[-1] < math.log(10) - 0.2 < good[0]  # below what guessing gives
    assert abs(dead[-1] - math.log(10)) < 0.02


def test_maxout_bad_input():
    for init, shape in (
        (maxout(5), (10, 12)),
        (maxout(5, in_axis=1, out_axis=0), (12, 10)),
        (maxout(5, in_axis=0, out_axis=(1, 2)), (10, 10, 4)),
    ):
        with pytest.raises(ValueError, match="units of rank 5"):
            init(jax.random.key(0), shape)
    turned = maxout(5, in_axis=1, out_axis=0)(jax.random.key(0), (200, 300))
    assert float(turned.var()) * 300 == pytest.approx(0.55555, rel=0.02)
    for options in ({"rank": 0}, {"pool": 0}, {"rank": 2.0}):
        with pytest.raises(ValueError, match=r"int >= 1"):
            maxout(**options)


# ------------------------------------------------------------------------------------ graphs


def test_learning_rate_scales():
    chain = np.diag([2] * 6, 1)
    whole = functools.partial(learning_rate_scale, extra=0)  # the graph is the whole network
    assert whole(chain) == pytest.approx(2**-1.5)
    parallel = np.zeros((6, 6), int)
    for i, j in [(0, 1), (1, 2), (2, 5), (0, 3), (3, 4), (4, 5)]:
        parallel[i, j] = 2
    assert path_lengths(parallel) == {3: 2}
    assert whole(parallel) == pytest.approx(1 / math.sqrt(2))
    assert whole(chain, kernel_size=5) == pytest.approx(2**-1.5 * 3 / 5)
    # by default with the stem, one layer and the readout that the base network has as well
    skip = [[0, 1], [0, 0]]
    assert learning_rate_scale(skip) == pytest.approx(1)
    assert learning_rate_scale([[0, 2], [0, 0]]) == pytest.approx((4 / 3) ** -1.5)
    assert learning_rate_scale(skip, extra=1, base=[1]) == pytest.approx(1)


def test_path_counts_against_matrix_powers():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = np.triu(rng.integers(0, 3, (7, 7)), 1)
        total = np.linalg.inv(np.eye(7) - (a > 0))[0, -1]
        order = rng.permutation(np.arange(1, 6))  # the order of the nodes does not matter
        order = np.concatenate([[0], order, [6]])
        if round(total) == 0:
            with pytest.raises(ValueError, match="no path"):
                path_lengths(a)
            continue
        lengths = path_lengths(a[np.ix_(order, order)])
        assert sum(lengths.values()) == round(total)
        # by length: the coefficients of a generating function, sampled at a point
        t = 0.37
        generating = np.linalg.inv(np.eye(7) - np.where(a == 2, t, a > 0))[0, -1]
        assert sum(n * t**k for k, n in lengths.items()) == pytest.approx(generating)


def test_a_sum_of_three_relus():
    n = 1024
    keys = jax.random.split(jax.random.key(0), 4)
    z = jax.random.normal(keys[0], (3, 64, n))
    node = jax.nn.relu(z).sum(0)
    assert float(jnp.square(node).mean()) == pytest.approx(1.5 + 6 / (2 * math.pi), rel=0.02)
    for degree, variance in ((3, 1.637), (1, 4.910)):
        draw = lambda key, d=degree: node @ architecture_aware(d)(key, (n, n), jnp.float32)
        out = jax.lax.map(draw, jax.random.split(keys[1], 8))
        assert float(jnp.square(out).mean()) == pytest.approx(variance, rel=0.05)
    edges = np.array([[0, 2, 2, 2, 0], [0, 0, 0, 0, 2], [0] * 4 + [1], [0] * 4 + [2], [0] * 5])
    assert in_degrees(edges) == [1, 1, 1, 1, 3]


def test_degree_one_is_he():
    key = jax.random.key(0)
    np.testing.assert_array_equal(architecture_aware()(key, (8, 8)), HE(key, (8, 8)))


@pytest.mark.parametrize(("fan", "size"), [("fan_in", 300), ("fan_out", 500)])
def test_either_fan_of_architecture_aware(fan, size):
    w = architecture_aware(3, fan=fan)(jax.random.key(0), (300, 500))
    assert float(w.var()) * 3 * size == pytest.approx(2, rel=0.02)


def test_graph_bad_input():
    with pytest.raises(ValueError, match="cycle"):
        path_lengths([[0, 2, 0], [0, 0, 2], [0, 2, 0]])
    with pytest.raises(ValueError, match="no path"):
        learning_rate_scale([[0, 0], [0, 0]])
    with pytest.raises(ValueError, match="square"):
        in_degrees([[0, 1]])
    with pytest.raises(ValueError, match="edges are"):
        in_degrees([[0, 3], [0, 0]])
    with pytest.raises(ValueError, match="layers with weights"):
        learning_rate_scale([[0, 1], [0, 0]], extra=0)
    with pytest.raises(ValueError, match="degree 1 or more"):
        architecture_aware(0)


# ---------------------------------------------------------------------------------- interval


@functools.cache
def interval_stack(name):
    init = {"ibp": ibp(), "he": HE}[name]
    n = 512

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 11)
        x = jax.random.uniform(keys[0], (16, n))

        def layer(bounds, k):
            low, high = affine_bounds(*bounds, init(k, (n, n), jnp.float32))
            return (jax.nn.relu(low), jax.nn.relu(high)), (low, high)

        return jax.lax.scan(layer, (x - 0.01, x + 0.01), keys[1:])[1]

    return run(jax.random.key(0))


def test_ibp_keeps_intervals():
    low, high = interval_stack("ibp")
    half = np.asarray(((high - low) / 2).mean((1, 2)))
    np.testing.assert_allclose(half, 0.02, rtol=0.06)
    low, high = interval_stack("he")
    half = np.asarray(((high - low) / 2).mean((1, 2)))
    factor = 0.5 * 512 * math.sqrt(2 / 512) * math.sqrt(2 / math.pi)
    assert factor == pytest.approx(12.77, abs=0.01)
    np.testing.assert_allclose(half[4:] / half[3:-1], factor, rtol=0.05)


def test_ibp_scales_stacks_and_layouts():
    key = jax.random.key(0)
    std = math.sqrt(2 * math.pi) / 512
    full = ibp()(key, (512, 300))
    assert float(full.std()) == pytest.approx(std, rel=0.02)
    np.testing.assert_allclose(ibp(0.5)(key, (512, 300)), 0.5 * full, rtol=1e-6)
    for init, shape in (
        (ibp(batch_axis=0), (3, 512, 300)),
        (ibp(in_axis=1, out_axis=0), (300, 512)),
        (ibp(), (4, 128, 300)),  # a convolution: its taps count
        (ibp(in_axis=0, out_axis=(1, 2)), (512, 20, 15)),
    ):
        assert float(init(key, shape).std()) == pytest.approx(std, rel=0.02)


def test_bounds_are_sound_and_tight():
    keys = jax.random.split(jax.random.key(0), 5)
    w1, w2 = jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (8, 3))
    bias, x = jax.random.normal(keys[2], (8,)), jax.random.normal(keys[3], (6,))
    points = x + 0.1 * jax.random.uniform(keys[4], (1000, 6), minval=-1)
    low, high = affine_bounds(x - 0.1, x + 0.1, w1, bias)
    z = points @ w1 + bias
    assert bool(((z >= low - 1e-5) & (z <= high + 1e-5)).all())
    corner = (x + 0.1 * jnp.sign(w1[:, 0])) @ w1[:, 0] + bias[0]
    assert float(corner) == pytest.approx(float(high[0]), abs=1e-5)
    low, high = affine_bounds(jax.nn.relu(low), jax.nn.relu(high), w2)
    z = jax.nn.relu(z) @ w2
    assert bool(((z >= low - 1e-5) & (z <= high + 1e-5)).all())


def test_regularizer_by_hand():
    inputs = (jnp.zeros((1, 4)), jnp.full((1, 4), 0.2))
    centre = jnp.array([[3.0, 1.0, -1.0, 0.05]])
    z = (centre - 0.4, centre + 0.4)
    mean = min(4 / 1, 1 / 4)
    c = np.asarray(centre)[0].astype(float)
    d = (c - c.mean()) ** 2
    a = (d[0] + d[1]) / d[2]
    terms = max(0, 0.5 - 0.25) + max(0, 0.5 - mean) + max(0, 0.5 - min(a, 1 / a))
    out = ibp_regularizer(inputs, [z], eps_ratio=0.25)
    assert float(out) == pytest.approx(0.5 * 0.75 * terms / 0.5, rel=1e-5)
    assert float(ibp_regularizer(inputs, [z, z], eps_ratio=0.25)) == pytest.approx(float(out))
    assert float(ibp_regularizer(inputs, [z], eps_ratio=1.0)) == 0.0


def test_regularizer_without_active_or_inactive_units():
    inputs = (jnp.zeros((2, 3)), jnp.ones((2, 3)))
    tight = lambda centre: (centre - 0.4, centre + 0.4)
    centre = jnp.arange(1.0, 7.0).reshape(2, 3)
    f = lambda c: ibp_regularizer(inputs, [tight(c)], eps_ratio=0.0)
    for c, value in [(centre, 0.0), (-centre, 1.0), (0 * centre, 0.0)]:
        got, grad = jax.value_and_grad(f)(c)
        assert float(got) == pytest.approx(value)
        assert bool(jnp.isfinite(grad).all())
    jitted = jax.jit(lambda e: ibp_regularizer(inputs, [tight(-centre)], eps_ratio=e))
    assert float(jitted(0.5)) == pytest.approx(0.5)


def test_interval_bad_input():
    with pytest.raises(ValueError, match="exceeds"):
        affine_bounds(jnp.ones(2), jnp.zeros(2), jnp.eye(2))
    with pytest.raises(ValueError, match="kernel"):
        affine_bounds(jnp.zeros(2), jnp.ones(2), jnp.eye(3))
    with pytest.raises(ValueError, match="at least one ReLU"):
        ibp_regularizer((jnp.zeros(1), jnp.ones(1)), [], eps_ratio=0.0)
    with pytest.raises(ValueError, match="two or more dimensions"):
        ibp()(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match="scale is positive"):
        ibp(0.0)


@pytest.mark.parametrize("init", [ibp(), maxout(2), architecture_aware(2), vi3nr(jnp.tanh)])
def test_initializer_protocol(init):
    key = jax.random.key(0)
    draw = lambda key: init(key, (6, 8), jnp.float32)
    eager = draw(key)
    np.testing.assert_allclose(eager, jax.jit(draw)(key), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(draw)(key[None])[0], eager, rtol=1e-5)
    assert (eager == draw(key)).all() and not (eager == draw(jax.random.key(1))).all()
    assert jax.eval_shape(lambda k: init(k, (6, 8), jnp.bfloat16), key).dtype == jnp.bfloat16
