"""Nested sub-networks: prefixes are slices, gradients stay inside, sums are sums."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from jaxkit import masks, trace
from jaxkit.masks.nested import draw, prefix, sandwich, sorted_space, subnet, subnet_grad
from tests.counting import counting

SIZES = (6, 8, 8, 3)


def init(key, sizes=SIZES):
    keys = jax.random.split(key, len(sizes) - 1)
    layer = lambda k, a, b: {
        "kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5,
        "bias": 0.1 * jax.random.normal(k, (b,)),
    }
    return [layer(*each) for each in zip(keys, sizes, sizes[1:], strict=False)]


def logits(params, x):
    for i, layer in enumerate(params):
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


def loss_fn(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


AXES = [
    {"kernel": (None, "h0"), "bias": ("h0",)},
    {"kernel": ("h0", "h1"), "bias": ("h1",)},
    {"kernel": ("h1", None), "bias": (None,)},
]
PARAMS = init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (4, 5, 6))
BATCHES = (X, jnp.arange(20).reshape(4, 5) % 3)
ONE = jax.tree.map(lambda a: a[0], BATCHES)


def masked(unit_mask):
    return masks.apply(PARAMS, subnet(PARAMS, unit_mask, AXES))


def test_the_axes_by_hand_are_those_of_the_model():
    found = trace.axes(logits, PARAMS, X[0])
    assert trace.check(logits, PARAMS, AXES, (X[0],)) < 1e-5
    found = trace.rename(found, {"0/kernel:1": "h0", "1/kernel:1": "h1"})
    assert trace.resolve(PARAMS, AXES) == found


def test_every_prefix_computes_what_the_slice_computes_in_one_compilation():
    run, traces = counting(
        lambda b, c: logits(masked(prefix(PARAMS, {"h0": b, "h1": c}, AXES)), X[0])
    )
    for b, c in [(b, c) for b in range(1, 9) for c in (1, 3, 8)]:
        unit_mask = {"h0": np.arange(8) < b, "h1": np.arange(8) < c}
        small, sizes, _ = masks.shrink(PARAMS, unit_mask, AXES)
        assert sizes == {"h0": b, "h1": c}
        np.testing.assert_allclose(run(b, c), by_hand(small, X[0]), rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_a_norm_that_does_not_see_the_slice_is_another_function():
    """The masked LayerNorm averages zeros; one that counts the live units alone is the slice."""

    def model(norm):
        def apply_fn(params, x):
            h = norm(x @ params[0]["kernel"] + params[0]["bias"])
            return h @ params[2]["kernel"] + params[2]["bias"]

        return apply_fn

    def layer_norm(h, live=True):
        mean = h.mean(-1, keepdims=True, where=live)
        var = ((h - mean) ** 2).mean(-1, keepdims=True, where=live)
        return jnp.where(live, (h - mean) * jax.lax.rsqrt(var + 1e-6), 0)

    live = np.arange(8) < 3
    small, _, _ = masks.shrink(PARAMS, {"h0": live}, AXES)
    due = model(layer_norm)([small[0], small[1], {"kernel": PARAMS[2]["kernel"][:3],
                                                  "bias": PARAMS[2]["bias"]}], X[0])  # fmt: skip
    got = model(layer_norm)(masked({"h0": live}), X[0])
    assert jnp.abs(got - due).max() > 0.1
    seen = model(lambda h: layer_norm(h, live))(masked({"h0": live}), X[0])
    np.testing.assert_allclose(seen, due, rtol=1e-5, atol=1e-5)
    axes = trace.axes(model(layer_norm), PARAMS, X[0])
    for make in (
        lambda: prefix(PARAMS, {"0/kernel:1": 3}, axes),
        lambda: sorted_space(PARAMS, {"0/kernel:1": [3, 8]}, axes),
    ):
        with pytest.raises(ValueError, match="'0/kernel:1' is not removable"):
            make()


def by_hand(params, x):
    """The layers in numpy."""
    x = np.asarray(x, np.float64)
    for i, layer in enumerate(params):
        x = np.maximum(x, 0) if i else x
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    return x


def stack(*keep):
    b, c = map(jnp.array, zip(*keep, strict=True))
    return jax.vmap(lambda b, c: prefix(PARAMS, {"h0": b, "h1": c}, AXES))(b, c)


@cache
def summed(mean=False, same_batch=False):
    step = lambda params, nets, batches: subnet_grad(
        loss_fn, params, nets, batches, AXES, mean=mean, same_batch=same_batch
    )
    return jax.jit(step)


def test_the_gradient_is_that_of_the_slice_and_zero_outside():
    unit_mask = {"h0": np.arange(8) < 3, "h1": np.arange(8) < 5}
    small, _, _ = masks.shrink(PARAMS, unit_mask, AXES)
    due = jax.grad(loss_fn)(small, ONE)
    _, grads = summed(same_batch=True)(PARAMS, stack((3, 5)), ONE)
    inside, _, _ = masks.shrink(grads, unit_mask, AXES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), inside, due)
    outside = jax.tree.map(lambda m: ~m, subnet(PARAMS, unit_mask, AXES))
    assert all((g == 0).all() for g in jax.tree.leaves(masks.apply(grads, outside)))
    assert sum(int(m.sum()) for m in jax.tree.leaves(outside)) == 155 - 59


def test_the_sum_is_the_sum_of_the_gradients_and_the_mean_its_part():
    keep = [(8, 8), (3, 5), (2, 8), (1, 1)]
    nets = stack(*keep)
    single = jax.jit(jax.value_and_grad(lambda p, m, batch: loss_fn(masks.apply(p, m), batch)))
    terms = [
        single(
            PARAMS,
            subnet(PARAMS, {n: m[i] for n, m in nets.items()}, AXES),
            jax.tree.map(lambda a, i=i: a[i], BATCHES),
        )
        for i in range(4)
    ]
    losses, grads = summed()(PARAMS, nets, BATCHES)
    np.testing.assert_allclose(losses, [loss for loss, _ in terms], rtol=1e-6)
    total = jax.tree.map(lambda *g: sum(g), *[g for _, g in terms])
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, grads, total)
    _, averaged = summed(mean=True)(PARAMS, nets, BATCHES)
    jax.tree.map(lambda a, b: check(a, b / 4), averaged, total)


def test_the_full_network_alone_is_standard_training_bit_for_bit():
    space = sorted_space(PARAMS, {"h0": [2, 8], "h1": [4, 8]}, AXES)
    tx = optax.adam(1e-2)

    def train(grad):
        def step(state, key):
            params, opt_state = state
            updates, opt_state = tx.update(grad(params, key), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        keys = jax.random.split(jax.random.key(5), 6)
        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(PARAMS)

    nested = train(
        lambda p, key: subnet_grad(loss_fn, p, draw(key, space, p=0.0), ONE, AXES, same_batch=True)[
            1
        ]
    )
    plain = train(lambda p, key: jax.grad(loss_fn)(p, ONE))
    for a, b in zip(jax.tree.leaves(nested), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    other = train(
        lambda p, key: subnet_grad(loss_fn, p, draw(key, space), ONE, AXES, same_batch=True)[1]
    )
    assert jnp.abs(other[0]["kernel"] - plain[0]["kernel"]).max() > 1e-3


def test_draws_are_uniform_over_the_product_and_nested():
    space = sorted_space(PARAMS, {"h0": [2, 5, 8], "h1": [4, 8]}, AXES)
    nets = jax.jit(lambda k: draw(k, space, 6000))(jax.random.key(0))
    widths = np.stack([nets["h0"].sum(1), nets["h1"].sum(1)], 1)
    pairs, counts = np.unique(widths, axis=0, return_counts=True)
    assert pairs.tolist() == [[a, b] for a in (2, 5, 8) for b in (4, 8)]
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5  # chi2(5), 0.1%
    np.testing.assert_array_equal(nets["h0"], np.arange(8) < widths[:, :1])
    tied = sorted_space(PARAMS, {("h0", "h1"): [1, 8]}, AXES)
    both = jax.jit(lambda k: draw(k, tied, 20))(jax.random.key(1))
    np.testing.assert_array_equal(both["h0"], both["h1"])
    two = sorted_space(PARAMS, {"h0": [1, 8]}, AXES)
    part = jax.jit(lambda k: draw(k, two, 4000, p=0.5))(jax.random.key(0))
    assert abs(np.mean(part["h0"].sum(1) == 1) - 0.25) < 0.03  # half of the random half


def test_sandwich_holds_both_ends():
    space = sorted_space(PARAMS, {"h0": [2, 5, 8], "h1": [4, 8]}, AXES)
    nets = sandwich(jax.random.key(0), space, random=3)
    assert nets["h0"].shape == (5, 8)
    assert nets["h0"].sum(1)[jnp.array([0, 4])].tolist() == [8, 2]
    assert nets["h1"].sum(1)[jnp.array([0, 4])].tolist() == [8, 4]


def test_half_precision_sums_in_float32():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    nets = {"h0": jnp.ones((300, 8), bool)}
    linear = lambda p, batch: p[0]["bias"].astype(jnp.float32).sum()
    _, grads = subnet_grad(linear, half, nets, ONE, AXES, same_batch=True)
    assert grads[0]["bias"].dtype == jnp.bfloat16
    assert (grads[0]["bias"] == 300).all()  # a sum in bfloat16 stops at 256


def test_integer_leaves_get_zeros():
    params = {"w": jnp.ones((1, 3)), "steps": jnp.array(3)}
    axes = {"w": (None, "h"), "steps": ()}
    loss = lambda p, batch: p["steps"] * p["w"].sum()
    nets = {"h": jnp.array([[True, True, False]])}
    losses, grads = subnet_grad(loss, params, nets, None, axes, same_batch=True)
    assert losses.tolist() == [6]
    assert grads["w"].tolist() == [[3, 3, 0]]
    assert grads["steps"].dtype == params["steps"].dtype
    assert grads["steps"] == 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"'h0': 0 units are to stay, and 1 \.\.\. 8 can"):
        prefix(PARAMS, {"h0": 0}, AXES)
    with pytest.raises(ValueError, match="9 units"):
        prefix(PARAMS, {"h0": 9}, AXES)
    with pytest.raises(ValueError, match="no axis is named 'h2'; the nearest: 'h"):
        prefix(PARAMS, {"h2": 1}, AXES)
    with pytest.raises(ValueError, match=r"'h0': the full network has 8 units, and the widths"):
        sorted_space(PARAMS, {"h0": [2, 4]}, AXES)
    for widths in ([4, 2, 8], [0, 8], [2, 2, 8], []):
        with pytest.raises(ValueError, match="increasing widths from 1"):
            sorted_space(PARAMS, {"h0": widths}, AXES)
    space = sorted_space(PARAMS, {"h0": [2, 8]}, AXES)
    for fn in (draw, sandwich):
        with pytest.raises(TypeError, match="typed key"):
            fn(jax.random.PRNGKey(0), space)
    with pytest.raises(ValueError, match=r"same_batch=True"):
        subnet_grad(loss_fn, PARAMS, stack((1, 1), (2, 2)), BATCHES, AXES)
    with pytest.raises(ValueError, match="no axis 'h9'"):
        subnet(PARAMS, {"h0": np.ones(8, bool)}, AXES, branches={"h9": "**"})


WIDTHS = (4, 8, 16, 32, 64, 128, 256)


@pytest.mark.slow
def test_sorted_training_keeps_narrow_networks_where_truncation_loses_them():
    """64-256-256-10 on digits, 1500 Adam steps: accuracies of the truncated networks."""
    data = load(train=1258, test=539)
    flat = lambda x: jnp.asarray(x).reshape(len(x), -1)
    x, y = flat(data.x), jnp.asarray(data.y)
    params = init(jax.random.key(0), (64, 256, 256, 10))
    params = jax.tree.map(lambda w: w * (w.ndim > 1), params)
    space = sorted_space(params, {("h0", "h1"): WIDTHS}, AXES)
    tx = optax.adam(1e-3)

    @jax.jit
    def train(key, p):
        def step(state, key):
            params, opt_state = state
            network, examples = jax.random.split(key)
            index = jax.random.randint(examples, (2, 128), 0, len(x))
            nets = draw(network, space, 2, p=p)
            _, grads = subnet_grad(loss_fn, params, nets, (x[index], y[index]), AXES)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 1500))[0][0]

    @jax.jit
    @jax.vmap
    def accuracy(width, which):
        chosen = jax.tree.map(lambda a, b: jnp.where(which, a, b), nested, plain)
        unit_mask = prefix(chosen, {"h0": width, "h1": width}, AXES)
        out = logits(masks.apply(chosen, subnet(chosen, unit_mask, AXES)), flat(data.x_test))
        return (out.argmax(1) == data.y_test).mean()

    nested, plain = (train(jax.random.key(1), p) for p in (1.0, 0.0))
    each = jnp.array(WIDTHS)
    sorted_, truncated = (accuracy(each, jnp.full(7, w)) for w in (True, False))
    print("sorted", np.round(sorted_, 3), "truncated", np.round(truncated, 3))
    assert sorted_[2] >= 0.9
    assert truncated[2] <= 0.5
    assert sorted_[-1] >= truncated[-1] - 0.01
