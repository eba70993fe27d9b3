import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import probes, trace, tree

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (200, 2))
Y = (X[:, 0] * X[:, 1] > 0).astype(jnp.int32)


def net(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]


def first(key):
    keys = jax.random.split(key)
    w, v = jax.random.normal(keys[0], (2, 16)), jax.random.normal(keys[1], (16, 2)) / 4
    return {"w": w, "b": jnp.zeros(16), "v": v}


def loss_fn(params):
    return optax.softmax_cross_entropy_with_integer_labels(net(params, X), Y).mean()


def error_fn(params):
    return (net(params, X).argmax(1) != Y).mean()


@pytest.fixture(scope="module")
def trained():
    tx = optax.adam(0.03)

    def step(state, _):
        params, opt_state = state
        u, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
        return (optax.apply_updates(params, u), opt_state), None

    def train(key):
        params = first(key)
        return jax.lax.scan(step, (params, tx.init(params)), None, 400)[0][0]

    return jax.jit(train)(jax.random.key(1))


def test_a_network_is_connected_to_itself(trained):
    found = probes.lmc(loss_fn, trained, trained)
    np.testing.assert_allclose(found.error, found.error[0], rtol=1e-5)
    assert abs(float(found.lmc)) < 1e-6 and found.error[0] < 0.2
    np.testing.assert_allclose(found.t, np.arange(11) / 10, atol=1e-7)


def test_a_permuted_network_is_behind_a_barrier(trained):
    axes = trace.axes(net, trained, X)
    (name,) = trace.named(axes)
    other = trace.permute(trained, axes, {name: jnp.roll(jnp.arange(16), 5)})
    found = jax.jit(lambda a, b: probes.lmc(error_fn, a, b))(trained, other)
    assert found.error[0] == found.error[-1] < 0.1
    assert found.lmc < -0.05
    assert found.lmc == pytest.approx(float(found.error[0] - found.error.max()), abs=1e-6)
    back = probes.lmc(error_fn, other, trained)
    assert back.lmc == pytest.approx(float(found.lmc), abs=0.011)


def test_a_convex_loss_has_no_barrier():
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(X @ p["w"], Y).mean()
    a, b = ({"w": 3 * jax.random.normal(k, (2, 2))} for k in jax.random.split(KEY))
    found = probes.lmc(loss, a, b)
    chord = (1 - found.t) * found.error[0] + found.t * found.error[-1]
    assert (found.error <= chord + 1e-6).all()
    # with equal ends, what lies farthest off them lies below them
    even = lambda p: jnp.sum(p["w"] ** 2)
    assert probes.lmc(even, a, jax.tree.map(jnp.negative, a)).lmc == pytest.approx(
        float(even(a)), rel=1e-6
    )


def test_statistics_are_recomputed_at_every_point():
    """A running mean fits the ends; between them it has to be computed from the weights there."""
    scales = jnp.array([1.0, -1.0])
    make = lambda s: {"w": s, "mean": jnp.mean((s * X[:, 0] - 1) ** 2)}
    a, b = (make(s) for s in scales)
    error = lambda p: (jnp.mean((p["w"] * X[:, 0] - 1) ** 2) - p["mean"]) ** 2
    stale = probes.lmc(error, a, b)
    fresh = probes.lmc(error, a, b, prepare=lambda p: make(p["w"]))
    assert fresh.lmc == 0 and (fresh.error == 0).all()
    assert max(stale.error[0], stale.error[-1]) < 1e-12 and stale.lmc < -0.1


def test_ends_are_exact_and_other_leaves_stay():
    a = {
        "w": jnp.array([1e30, 1.0], jnp.float32),
        "n": jnp.array(3),
        "h": jnp.ones(2, jnp.bfloat16),
    }
    b = {
        "w": jnp.array([1.0, 1e-30], jnp.float32),
        "n": jnp.array(4),
        "h": jnp.zeros(2, jnp.bfloat16),
    }
    seen = []

    def keep(params):
        assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, a)
        seen.append(tree.paths(params))
        return jnp.stack([params["w"][0], params["w"][1], params["n"] * 1.0]).sum()

    found = probes.lmc(keep, a, b, points=3)
    assert found.error[0] == keep(a) and found.error[-1] == 1 + 3
    assert seen


def test_bad_input_is_explained():
    a = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\), and \(2,\) was due"):
        probes.lmc(loss_fn, a, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="points=2, and at least 3"):
        probes.lmc(loss_fn, a, a, points=2)
