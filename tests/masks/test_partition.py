"""Partitions of piecewise affine networks, by hand; and units that share a boundary."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxkit import masks, trace

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (50, 3))


def net(params, x):
    h = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"])
    h = jax.nn.relu(h @ params["c"]["w"] + params["c"]["b"])
    return h @ params["out"]


def draw(seed):
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = jax.random.normal
    return {
        "a": {"w": normal(keys[0], (3, 5)), "b": normal(keys[1], (5,))},
        "c": {"w": normal(keys[2], (5, 4)), "b": normal(keys[3], (4,))},
        "out": normal(keys[4], (4, 2)),
    }


A, B = draw(0), draw(1)
of = jax.jit(lambda params: masks.partition(net, params, X))


def test_signs_are_those_of_the_pre_activations():
    first = X @ A["a"]["w"] + A["a"]["b"]
    second = jax.nn.relu(first) @ A["c"]["w"] + A["c"]["b"]
    signs = of(A).signs
    assert len(signs) == 2
    np.testing.assert_array_equal(signs[0], first > 0)
    np.testing.assert_array_equal(signs[1], second > 0)


def test_distance_is_a_metric_on_patterns():
    a, b = of(A), of(B)
    np.testing.assert_array_equal(masks.partition_distance(a, a), [0, 0])
    there, back = masks.partition_distance(a, b), masks.partition_distance(b, a)
    np.testing.assert_array_equal(there, back)
    share = [np.mean(np.asarray(s) != np.asarray(t)) for s, t in zip(a.signs, b.signs, strict=True)]
    np.testing.assert_allclose(there, share, rtol=1e-6)
    assert ((there > 0.1) & (there < 0.9)).all()


def test_scaling_a_layer_keeps_its_own_partition():
    scaled = {**A, "a": jax.tree.map(lambda w: 4 * w, A["a"])}
    far = masks.partition_distance(of(A), of(scaled))
    assert far[0] == 0 and far[1] > 0  # the biases of the second layer are what they were
    both = {**scaled, "c": {"w": scaled["c"]["w"], "b": 4 * A["c"]["b"]}}
    np.testing.assert_array_equal(masks.partition_distance(of(A), of(both)), [0, 0])


def test_negating_one_unit_moves_its_share():
    layer = {"w": A["a"]["w"].at[:, 2].multiply(-1), "b": A["a"]["b"].at[2].multiply(-1)}
    far = masks.partition_distance(of(A), of({**A, "a": layer}))
    assert float(far[0]) == pytest.approx(1 / 5, abs=1e-7)


def test_one_dimension_by_hand():
    """Units relu(x - b): the share of x between the old and the new kink."""
    kinks = lambda b, x: jax.nn.relu(x[:, None] - b)
    x = (jnp.arange(1000) + 0.5) / 1000
    old, new = jnp.array([0.2, 0.5]), jnp.array([0.3, 0.45])
    far = masks.partition_distance(masks.partition(kinks, old, x), masks.partition(kinks, new, x))
    assert float(far[0]) == pytest.approx((0.1 + 0.05) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (jax.nn.relu, [lambda z: z > 0]),
        (lambda z: jnp.maximum(0, z), [lambda z: z > 0]),
        (jax.nn.leaky_relu, [lambda z: z >= 0]),
        (jnp.abs, [lambda z: z > 0]),
        (jax.nn.relu6, [lambda z: z > 0, lambda z: z < 6]),
        (jax.nn.hard_tanh, [lambda z: z > 1, lambda z: z < -1]),
        (lambda z: jnp.clip(z, -1, 2), [lambda z: z > -1, lambda z: z < 2]),
        (lambda z: jnp.maximum(z[:, :2], z[:, 2:]), [lambda z: z[:, :2] > z[:, 2:]]),
        (jax.checkpoint(jax.nn.relu), [lambda z: z > 0]),
    ],
)
def test_every_kink_is_found(activation, expected):
    w = 3 * jax.random.normal(KEY, (3, 4))
    signs = masks.partition(lambda w, x: activation(x @ w), w, X).signs
    assert len(signs) == len(expected)
    for found, fn in zip(signs, expected, strict=True):
        np.testing.assert_array_equal(found, fn(X @ w))
        assert 0.01 < found.mean() < 0.99


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(6)(x))
        return nn.Dense(2)(nn.relu(x))


def test_any_front_end():
    """flax with BatchNorm as it predicts, and equinox."""
    params = Linen().init(KEY, X)
    (signs,) = masks.partition(Linen().apply, params, X).signs
    dense: dict = dict(params["params"]["Dense_0"])
    np.testing.assert_array_equal(signs, X @ dense["kernel"] + dense["bias"] > 0)
    mlp = eqx.nn.MLP(3, 2, 5, 2, key=KEY)
    params, static = eqx.partition(mlp, eqx.is_array)
    run = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    assert [s.shape for s in masks.partition(run, params, X).signs] == [(50, 5), (50, 5)]


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.softplus])
def test_smooth_activations_are_refused(activation):
    smooth = lambda w, x: jax.nn.relu(activation(x @ w))
    with pytest.raises(ValueError, match=r"` of activations at .* is not piecewise affine"):
        masks.partition(smooth, jnp.ones((3, 2)), X)


def test_what_is_not_piecewise_affine_is_refused():
    w = jax.random.normal(KEY, (3, 3))
    gated = lambda w, x: jax.nn.relu(x @ w) * (x @ w)
    with pytest.raises(ValueError, match=r"`mul` of activations at .*test_partition"):
        masks.partition(gated, w, X)
    normed = lambda w, x: jax.nn.relu(x @ w / jnp.linalg.norm(x @ w, axis=1, keepdims=True))
    with pytest.raises(ValueError, match="is not piecewise affine"):
        masks.partition(normed, w, X)
    with pytest.raises(ValueError, match="no activation with a kink depends on params and inputs"):
        masks.partition(lambda w, x: jax.nn.relu(x) @ jax.nn.relu(w), w, X)
    step = lambda h, _: (jax.nn.relu(h @ jnp.eye(3)), None)
    scanned = lambda w, x: jax.lax.scan(step, x @ w, None, 2)[0]
    with pytest.raises(ValueError, match=r"the activations inside `scan` at .* cannot be followed"):
        masks.partition(scanned, w, X)
    standardized = lambda w, x: jax.nn.relu((x - x.mean(0)) / jnp.maximum(x.std(0), 1e-3) @ w)
    assert len(masks.partition(standardized, w, X).signs) == 1  # of the inputs alone, it may


def test_partitions_of_other_inputs_do_not_compare():
    other = masks.partition(net, A, X[::-1])
    with pytest.raises(ValueError, match="the partitions are of other inputs"):
        masks.partition_distance(of(A), other)
    with pytest.raises(ValueError, match=r"of other layers: .*\(50, 5\).*\(49, 5\)"):
        masks.partition_distance(of(A), masks.partition(net, A, X[1:]))


def test_the_early_bird_waits_for_the_last_epochs():
    kink = lambda b, x: jax.nn.relu(x - b)
    x = (jnp.arange(100) + 0.5) / 100
    epochs = [masks.partition(kink, jnp.array(b), x) for b in (0.0, 0.3, 0.4, 0.45, 0.5, 0.55)]
    stop = [bool(masks.early_bird(epochs[:e], epochs[e])) for e in range(6)]
    # at epoch 4 the largest distance is 0.2, at epoch 5 it is 0.15
    assert stop == [False, False, False, False, False, True]
    assert bool(masks.early_bird(epochs[:4], epochs[4], threshold=0.21))
    assert bool(masks.early_bird(epochs[:4], epochs[4], window=2))


def test_the_canvas_is_a_plane_through_two_images():
    x0, x1 = jax.random.normal(KEY, (2, 4, 4, 1))
    plane = masks.canvas(x0, x1, 5)
    assert plane.shape == (25, 4, 4, 1)
    for i, j in ((0, 0), (4, 0), (0, 4), (1, 3)):
        np.testing.assert_allclose(plane[5 * i + j], (i * x0 + j * x1) / 4, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- redundant units


def by_hand(w, b, weight):
    """The same removal in numpy: closest pair, smaller norm (the later if equal) leaves."""
    norm = np.linalg.norm(w, axis=1)
    alive, scores = list(range(len(w))), np.full(len(w), np.inf)
    while len(alive) > 1:
        best = (np.inf, 0, 0)
        for n, i in enumerate(alive):
            for j in alive[n + 1 :]:
                inner = w[i] @ w[j]
                d = 1 - abs(inner) / (norm[i] * norm[j])
                d += weight * abs(b[i] / norm[i] - (-1 if inner < 0 else 1) * b[j] / norm[j])
                best = min(best, (d, i, j))
        d, i, j = best
        gone = i if norm[i] < norm[j] else j
        scores[gone] = d
        alive.remove(gone)
    return scores


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_redundancy_equals_the_loop(weight):
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((12, 4)), rng.standard_normal(12)
    spline = jax.jit(lambda w, b: masks.spline({"h": (w, b)}, bias_weight=weight)["h"])
    found = spline(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32))
    expected = by_hand(w, b, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    # the order of leaving is the order of the scores
    assert np.sort(expected).tolist() == sorted(expected.tolist())


def test_twins_go_first_the_smaller_one():
    double = {
        "w": A["a"]["w"].at[:, 3].set(2 * A["a"]["w"][:, 1]),
        "b": A["a"]["b"].at[3].set(2 * A["a"]["b"][1]),
    }
    params = {**A, "a": double}
    axes, roles = trace.axes(net, params, X), trace.roles(net, params, X)
    scores = masks.spline(masks.hyperplanes(params, axes, roles))
    name = next(iter(scores))
    assert scores[name].shape == (5,) and int(scores[name].argmin()) == 1
    assert scores[name][1] < 1e-5
    keep = masks.topk(scores, keep=8, where="**")  # of 9 units in both layers
    assert keep[name].tolist() == [True, False, True, True, True]
    # a twin of opposite sign has the same boundary
    opposite = {"w": double["w"].at[:, 3].multiply(-1), "b": double["b"].at[3].multiply(-1)}
    scores = masks.spline(masks.hyperplanes({**A, "a": opposite}, axes, roles))
    assert int(scores[name].argmin()) == 1 and scores[name][1] < 1e-5


def test_a_chain_of_twins_leaves_one():
    w = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    scores = masks.spline({"h": (w, jnp.zeros(4))})["h"]
    assert scores.tolist() == [0.0, 0.0, np.inf, 1.0]
    assert masks.spline({"h": (w[:1], jnp.zeros(1))})["h"].tolist() == [np.inf]


def test_units_without_a_boundary_go_first_and_change_no_other_score():
    w = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [0.0, 1.0]])
    b = jnp.array([0.1, 0.1, 0.5, 0.3])
    scores = masks.spline({"h": (w, b)})["h"]
    rest = masks.spline({"h": (w[jnp.array([0, 1, 3])], b[jnp.array([0, 1, 3])])})["h"]
    assert scores[2] == 0 and (rest > 0).all()
    np.testing.assert_array_equal(scores[jnp.array([0, 1, 3])], rest)
    assert masks.spline({"h": (0 * w, b)})["h"].tolist() == [np.inf, 0, 0, 0]
    tiny = masks.spline({"h": (2.0**-50 * w, 2.0**-50 * b)})["h"]  # boundaries know no scale
    np.testing.assert_array_equal(tiny, scores)


def test_folding_a_batch_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, epsilon=1e-3)(nn.Dense(6)(x))

    variables = Net().init(KEY, X)
    variables = jax.tree.map(lambda w: jax.random.uniform(KEY, w.shape) + 0.3, variables)
    dense = variables["params"]["Dense_0"]
    norm = variables["params"]["BatchNorm_0"] | variables["batch_stats"]["BatchNorm_0"]
    kernel, bias = masks.fold_norm(dense["kernel"], **norm, kernel_bias=dense["bias"], epsilon=1e-3)
    expected = np.asarray(Net().apply(variables, X))
    np.testing.assert_allclose(X @ kernel + bias, expected, rtol=1e-4, atol=1e-5)


def test_unfolded_norms_are_refused():
    params = Linen().init(KEY, X)
    axes, roles = trace.axes(Linen().apply, params, X), trace.roles(Linen().apply, params, X)
    with pytest.raises(ValueError, match=r"has the gain '.*BatchNorm_0/\w+': fold the normaliz"):
        masks.hyperplanes(params, axes, roles)
