"""Residual wires: exact identities, variances, what trains and what does not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit.init.residual import Wire, convex_wire, deepscale_wire, nf_wire, residual, rezero

KEY = jax.random.key(0)


def test_residual():
    x = jnp.array([1.0, -2.0])
    y = residual(jnp.exp, x, Wire(0.5, 2.0, 3.0))
    np.testing.assert_allclose(y, 0.5 * x + 2 * np.exp(3 * x), rtol=1e-6)
    one = Wire(*(jnp.ones(()),) * 3)
    np.testing.assert_array_equal(residual(jnp.exp, x, one), x + jnp.exp(x))
    half = residual(jnp.exp, x.astype(jnp.bfloat16), one)
    assert half.dtype == jnp.bfloat16
    wide = jnp.array([0.1, 0.2])
    mixed = residual(lambda x: x * wide, x.astype(jnp.bfloat16), one)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(float), x * (1 + wide), rtol=1e-2)
    with pytest.raises(ValueError, match="shape"):
        residual(lambda x: x[:1], x, one)


def test_wires_in_closed_form():
    wire = convex_wire(5, 0.3)
    assert all(number.shape == (5,) for number in wire)
    np.testing.assert_allclose(wire.skip**2 + wire.branch**2, 1, rtol=1e-6)
    np.testing.assert_allclose(wire.branch**2, 0.3, rtol=1e-6)
    deep = deepscale_wire(10, k=2.0)
    np.testing.assert_allclose(deep.branch**2, 0.2, rtol=1e-6)
    assert deep.skip.shape == (20,)
    nf = nf_wire((3, 2, 1), alpha=0.5, skip_gain=0.0)
    np.testing.assert_array_equal(nf.branch, 0)
    np.testing.assert_allclose(nf.pre**-2, [1, 1.25, 1.5, 1.75, 1.25, 1.5], rtol=1e-6)
    np.testing.assert_array_equal(nf.skip, 1)


def test_wires_of_traced_numbers():
    count = 0

    @jax.jit
    def wires(g2, alpha):
        nonlocal count
        count += 1
        return convex_wire(2, g2), nf_wire((2,), alpha=alpha), deepscale_wire(2, k=g2)

    for g2, alpha in ((0.1, 0.2), (0.4, 0.3)):
        expected = convex_wire(2, g2), nf_wire((2,), alpha=alpha), deepscale_wire(2, k=g2)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wires(g2, alpha), expected
        )
    assert count == 1


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_the_two_orders_of_nf(order, name):
    """``phi(x / beta)`` and ``phi(x) / beta`` agree for relu alone; ours is the first."""
    phi, x = getattr(jax.nn, name), jnp.linspace(-3, 3, 13)
    wire = jax.tree.map(lambda numbers: numbers[-1], nf_wire((4,)))
    ours = residual(phi, x, wire) - x
    other = 0.2 * (phi(x * wire.pre) if order == "paper" else phi(x) * wire.pre)
    same = order == "paper" or name == "relu"
    assert bool(jnp.allclose(ours, other, atol=1e-6)) == same


def test_bad_input():
    for g2 in (-0.1, 1.1):
        with pytest.raises(ValueError, match="g2"):
            convex_wire(2, g2)
    with pytest.raises(ValueError, match="block"):
        convex_wire(0, 0.5)
    with pytest.raises(ValueError, match="layers"):
        deepscale_wire(0)
    for depths in ((), (2, 0)):
        with pytest.raises(ValueError, match="stages"):
            nf_wire(depths)


# ------------------------------------------------------------------------------------- ReZero


def draw(key, depth, n, inputs, classes):
    """A stack of blocks with two branches each that share an alpha."""
    he = jax.nn.initializers.he_normal()
    block = lambda key: {
        "alpha": jnp.ones(()),
        "attention": {"kernel": he(key, (n, n))},
        "mlp": {"kernel": he(jax.random.fold_in(key, 1), (n, n))},
    }
    return {
        "in": {"kernel": jax.nn.initializers.lecun_normal()(key, (inputs, n))},
        "blocks": jax.vmap(block)(jax.random.split(key, depth)),
        "out": {"kernel": jax.nn.initializers.lecun_normal()(key, (n, classes))},
    }


def stack(blocks, x, skip=1.0):
    def block(x, p):
        wire = Wire(skip, p["alpha"], 1.0)
        x = residual(lambda x: jax.nn.relu(x @ p["attention"]["kernel"]), x, wire)
        return residual(lambda x: jax.nn.relu(x @ p["mlp"]["kernel"]), x, wire), None

    return jax.lax.scan(block, x, blocks)[0]


def test_rezero_is_exactly_the_identity():
    params = draw(KEY, 6, 8, 4, 3)
    blocks = rezero()(KEY, params)["blocks"]
    x = jax.random.normal(KEY, (5, 8))
    np.testing.assert_array_equal(stack(blocks, x), x)
    np.testing.assert_array_equal(jax.jacobian(lambda x: stack(blocks, x))(x[0]), np.eye(8))

    target = jax.random.normal(jax.random.key(1), x.shape)
    grads = jax.grad(lambda blocks: ((stack(blocks, x) - target) ** 2).sum())(blocks)
    assert bool((jnp.abs(grads.pop("alpha")) > 1e-3).all())
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, 0)


def test_alpha_one_is_the_plain_residual_network():
    blocks = draw(KEY, 3, 8, 4, 3)["blocks"]
    x = y = jax.random.normal(KEY, (5, 8))
    for i in range(3):
        for branch in ("attention", "mlp"):
            y = y + jax.nn.relu(y @ blocks[branch]["kernel"][i])
    np.testing.assert_allclose(stack(blocks, x), y, rtol=2e-5)


def test_rezero_leaves_the_rest_and_needs_a_live_branch():
    params = draw(KEY, 2, 4, 4, 3)
    new = rezero()(KEY, params)
    assert new["blocks"]["mlp"]["kernel"] is params["blocks"]["mlp"]["kernel"]
    np.testing.assert_array_equal(new["blocks"]["alpha"], jnp.zeros(2))
    dead = params | {"out": {"kernel": jnp.zeros((4, 3))}}
    rezero()(KEY, dead)  # a zero head outside the block is no fault
    for branch in ("attention", "mlp"):  # one alpha is that of both, at any depth below its parent
        dead = params | {"blocks": params["blocks"] | {branch: {"kernel": jnp.zeros((2, 4, 4))}}}
        with pytest.raises(ValueError, match=f"blocks/{branch}/kernel"):
            rezero()(KEY, dead)
    layers = [{"alpha": jnp.ones(()), "f": {"g": {"kernel": jnp.ones((2, 2))}}} for _ in range(2)]
    new = rezero()(KEY, layers)
    assert [layer["alpha"].item() for layer in new] == [0, 0]  # one number a layer
    layers[1]["f"]["g"]["kernel"] = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="1/f/g/kernel"):
        rezero()(KEY, layers)
    with pytest.raises(ValueError, match="matches no leaf"):
        rezero()(KEY, {"w": jnp.ones((2, 2))})
    half = rezero()(KEY, {"alpha": jnp.ones((), jnp.bfloat16)})["alpha"]
    assert half.dtype == jnp.bfloat16 and half.shape == ()


def test_a_dead_branch_has_no_gradient_at_all():
    """What the error is about: with alpha = 0 and a zero branch nothing ever moves."""
    blocks = rezero()(KEY, draw(KEY, 2, 4, 4, 3))["blocks"]
    blocks = jax.tree.map(jnp.zeros_like, blocks)
    x = jax.random.normal(KEY, (5, 4))
    for leaf in jax.tree.leaves(jax.grad(lambda b: (stack(b, x) ** 2).sum())(blocks)):
        np.testing.assert_array_equal(leaf, 0)


def trainer(tx):
    """Return ``(params, skip) -> (test accuracy, losses)`` after 300 steps on the digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)

    @jax.jit
    def train(params, skip):
        def logits(params, x):
            h = stack(params["blocks"], x @ params["in"]["kernel"], skip)
            return h @ params["out"]["kernel"]

        def loss(params, i):
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(params, x[i]), y[i]
            ).mean()

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, jax.random.randint(key, (64,), 0, 1300))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        carry, losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(KEY, 300))
        hit = logits(carry[0], x[1300:]).argmax(-1) == y[1300:]
        return hit.mean(), losses

    return train


def test_rezero_trains_where_a_plain_network_does_not():
    train = trainer(optax.adagrad(0.01))
    params = draw(KEY, 32, 32, 64, 10)  # 32 blocks of two branches: 64 layers
    accuracy, _ = train(rezero()(KEY, params), 1.0)
    plain, _ = train(params, 0.0)
    _, ungated = train(params, 1.0)
    assert float(accuracy) > 0.8
    assert float(plain) < 0.3
    assert float(ungated[0]) > 1e6  # 2^64 of variance


def test_plain_sgd_at_128_layers_needs_a_small_rate():
    """As the docstring says."""
    params = rezero()(KEY, draw(KEY, 64, 32, 64, 10))
    assert float(trainer(optax.sgd(0.01))(params, 1.0)[1][-1]) < 0.5
    assert not bool(jnp.isfinite(trainer(optax.sgd(0.03))(params, 1.0)[1][-1]))


def test_ungated_variance_doubles_with_each_layer():
    blocks = draw(KEY, 32, 256, 4, 3)["blocks"]
    x = jax.random.normal(KEY, (16, 256))
    growth = float((stack(blocks, x) ** 2).mean())
    # relu(He) keeps the second moment, and is positively correlated with x: at least 2 a layer
    assert math.log2(growth) > 64 * 0.95
