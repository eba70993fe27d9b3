"""Layers on weights: they commute with all permutations of units, and they are all that do."""

from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from sklearn.datasets import load_digits

from jaxkit import nn, trace

KEY = jax.random.key(0)


def mlp(p, x):
    x = jnp.tanh(x @ p["w0"] + p["b0"])
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def conv(p, x):
    layer = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(layer(x, p["conv0"]) + p["bias"])
    return jax.nn.relu(layer(x, p["conv1"])).mean((1, 2)) @ p["out"]


def residual(p, x):
    x = x @ p["into"]
    return (x + jnp.tanh(x @ p["inner"] + p["bias"])) @ p["out"]


def attention(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    heads = lambda z: z.reshape(*z.shape[:-1], 2, 3)
    weights = jax.nn.softmax(jnp.einsum("bihs,bjhs->bhij", heads(q), heads(k)))
    mixed = jnp.einsum("bhij,bjhs->bihs", weights, heads(v))
    return mixed.reshape(*x.shape[:-1], -1) @ p["out"]


def draw(shapes):
    keys = jax.random.split(KEY, len(shapes))
    pairs = zip(keys, shapes.items(), strict=True)
    return {name: jax.random.normal(key, shape) for key, (name, shape) in pairs}


X = jax.random.normal(jax.random.key(1), (5, 2))
MODELS = {
    "mlp": (mlp, {"w0": (2, 3), "b0": (3,), "w1": (3, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}, X),
    "conv": (conv, {"conv0": (2, 1, 1, 2), "bias": (2,), "conv1": (1, 2, 2, 3), "out": (3, 1)},
             jnp.sin(jnp.arange(32.0)).reshape(2, 4, 4, 1)),
    "residual": (residual, {"into": (2, 4), "inner": (4, 4), "bias": (4,), "out": (4, 1)}, X),
    "attention": (attention, {"qkv": (2, 18), "out": (6, 1)}, X[None]),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    apply_fn, shapes, x = MODELS[request.param]
    params = draw(shapes)
    return apply_fn, params, trace.axes(apply_fn, params, x), x


def channels(params, n=1):
    """Give every entry the powers of its value."""
    return jax.tree.map(lambda w: jnp.stack([w ** (i + 1) for i in range(n)], -1), params)


def shuffled(axes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(axis.size) for name, axis in trace.named(axes).items()}


def moved(axes, features, perms):
    """Permute features: channel by channel."""
    last = {name: f[..., 0] for name, f in features.items()}
    n = next(iter(features.values())).shape[-1]
    each = [trace.permute({k: features[k][..., c] for k in last}, axes, perms) for c in range(n)]
    return {name: jnp.stack([one[name] for one in each], -1) for name in last}


def close(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.allclose(x, y, atol=1e-5), a, b)))


def theta_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)


def maps(params, axes, n_in, n_hidden, n_out):
    """A layer and a head with random numbers, biases too."""
    layer = lambda key: nn.equivariant_init(key, params, axes, n_in, n_hidden)
    head = lambda key: nn.invariant_init(key, params, axes, n_hidden, n_out)
    return theta_like((jax.eval_shape(layer, KEY), jax.eval_shape(head, KEY)))


def test_commutes_with_the_permutations_and_the_head_does_not_see_them(model):
    apply_fn, params, axes, x = model
    assert trace.check(apply_fn, params, axes, (x,)) < 1e-5
    perms = shuffled(axes)
    permuted = trace.permute(params, axes, perms)
    np.testing.assert_allclose(apply_fn(permuted, x), apply_fn(params, x), atol=1e-5)
    layer, head = maps(params, axes, 2, 3, 4)

    def run(params, pool):
        out = nn.equivariant_apply(layer, channels(params, 2), axes, pool=pool)
        scaled = jax.tree.map(lambda y: y / 10, out)
        return scaled, nn.invariant_apply(head, scaled, axes, pool=pool) / 10

    both = jax.jit(lambda params: (run(params, "mean"), run(params, "max")))
    other = both({name: jnp.flip(w) for name, w in params.items()})
    for one, moved_one, flipped in zip(both(params), both(permuted), other, strict=True):
        (out, vector), (out_permuted, vector_permuted) = one, moved_one
        assert close(out_permuted, moved(axes, out, perms))
        assert not close(out_permuted, out)
        np.testing.assert_allclose(vector_permuted, vector, rtol=1e-4, atol=1e-5)
        assert not close(flipped[0], out) and not np.allclose(flipped[1], vector, rtol=1e-2)


def test_is_every_equivariant_linear_map(model):
    """As many independent maps as the characters of the representation say."""
    _, params, axes, _ = model
    ends = np.cumsum([w.size for w in params.values()])
    numbers = {
        name: np.arange(end - w.size, end).reshape(w.shape)
        for end, (name, w) in zip(ends, params.items(), strict=True)
    }
    sizes = {name: axis.size for name, axis in trace.named(axes).items()}

    def stay(choice):
        perms = {name: np.array(p) for name, p in zip(sizes, choice, strict=True)}
        moved = trace.permute(numbers, axes, perms)
        return sum((moved[name] == w).sum() for name, w in numbers.items())

    chi = np.array([stay(p) for p in product(*(permutations(range(n)) for n in sizes.values()))])
    layer, _ = maps(params, axes, 1, 1, 1)
    vector, unravel = jax.flatten_util.ravel_pytree(layer)
    count = sum(w.size for each in layer.values() for w in jax.tree.leaves(each["kernel"]))
    assert (count, vector.size - count) == (np.mean(chi**2.0), np.mean(chi))
    if "w0" in params:
        assert count == 114

    draws = max(  # so many that the entries of each block are more than the maps into it
        2 * sum(w.size for w in jax.tree.leaves(each)) // cut.array.size + 1
        for each, cut in zip(layer.values(), trace.blocks(params, axes).values(), strict=True)
    )
    many = theta_like({name: np.zeros((draws, *w.shape)) for name, w in params.items()})

    @jax.jit
    @jax.vmap
    def columns(theta):
        apply = lambda p: nn.equivariant_apply(unravel(theta), channels(p), axes)
        return jax.flatten_util.ravel_pytree(jax.vmap(apply)(many))[0]

    matrix = np.asarray(columns(jnp.eye(vector.size)))
    assert np.linalg.matrix_rank(matrix.astype(np.float64), tol=1e-3) == vector.size


HIDDEN = {"w": (None, "a"), "v": ("a", "a"), "steps": (None,)}


def test_a_way_is_what_it_spells():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
        "steps": jnp.arange(3),
    }
    zero = jax.tree.map(jnp.zeros_like, maps(params, HIDDEN, 1, 1, 1)[0])
    assert set(zero) == {"w", "v"}
    features = {name: w[..., None] if w.ndim > 1 else w for name, w in params.items()}

    def at(target, source, way, kernel):
        layer = jax.tree.map(jnp.copy, zero)
        layer[target]["kernel"][source][way] = jnp.asarray(kernel, jnp.float32)
        out = nn.equivariant_apply(layer, features, HIDDEN)
        np.testing.assert_array_equal(out["steps"], params["steps"])
        return np.asarray(out[target][..., 0])

    w, v = np.asarray(params["w"], np.float64), np.asarray(params["v"], np.float64)
    each = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    each(at("v", "v", "ab->ba", [[2.0]]), 2 * v.T)
    each(at("v", "v", "aa->bc", [[2.0]]), np.full((3, 3), 2 * np.trace(v) / 3))
    each(at("v", "v", "ab->ac", [[1.0]]), np.repeat(v.mean(1)[:, None], 3, 1))
    each(at("v", "v", "ab->bb", [[1.0]]), np.diag(v.mean(0)))
    each(at("v", "w", "a->aa", [[1.0], [3.0]]), np.diag(w[0] + 3 * w[1]))
    each(at("w", "v", "aa->a", [[1.0, 3.0]]), np.stack([np.diag(v), 3 * np.diag(v)]))
    each(at("w", "w", "a->b", [[0, 1], [1, 0]]), np.repeat(w.mean(1)[::-1, None], 3, 1))


def test_is_not_invariant_to_the_order_of_inputs():
    params = draw(MODELS["mlp"][1])
    axes = trace.axes(mlp, params, X)
    layer, head = maps(params, axes, 1, 1, 2)
    swapped = {**params, "w0": params["w0"][::-1]}

    @jax.jit
    def run(params):
        out = nn.equivariant_apply(layer, channels(params), axes)
        return out["b1"], nn.invariant_apply(head, channels(params), axes)

    for got, want in zip(run(swapped), run(params), strict=True):
        assert not np.allclose(got, want, atol=1e-2)


def test_draws_keep_variance_and_go_over_networks():
    shapes = {"w0": (2, 30), "b0": (30,), "w1": (30, 2), "s": ()}
    axes = {"w0": (None, "a"), "b0": ("a",), "w1": ("a", None), "s": ()}
    many = {name: jax.random.normal(KEY, (3, *shape)) for name, shape in shapes.items()}
    many["b0"] = many["b0"].astype(jnp.bfloat16)
    one = jax.tree.map(lambda w: w[0], many)
    layer = nn.equivariant_init(KEY, one, axes, 64, 64)
    for maps_ in layer.values():
        kernels = jax.tree.leaves(maps_["kernel"])
        entries = np.concatenate([np.ravel(k) for k in kernels])
        fan_in = sum(k.shape[0] for k in kernels)
        np.testing.assert_allclose(entries.std(), fan_in**-0.5, rtol=0.03)
        assert not any(np.any(b) for b in maps_["bias"].values())
    small = nn.equivariant_init(KEY, one, axes, 1, 2)
    apply = jax.jit(lambda p: nn.equivariant_apply(small, channels(p), axes))
    out, first = jax.vmap(apply)(many), apply(one)
    assert {name: y.dtype for name, y in out.items()} == {k: w.dtype for k, w in many.items()}
    assert jax.tree.map(jnp.shape, first) == {name: (*s, 2) for name, s in shapes.items()}
    for name, y in first.items():
        tol = 2e-2 if name == "b0" else 1e-5
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (out[name][0], y)), tol, tol
        )


def test_bad_input():
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 3))}
    axes = {"w": (None, "a"), "v": ("a", "b")}
    layer, features = maps(params, axes, 1, 2, 1)[0], channels(params)
    with pytest.raises(ValueError, match="no float leaf has an axis"):
        nn.equivariant_init(KEY, {"w": params["w"]}, {"w": (None, None)}, 1, 2)
    with pytest.raises(ValueError, match="0 channels in and 2 out"):
        nn.invariant_init(KEY, params, axes, 0, 2)
    with pytest.raises(TypeError, match="typed key"):
        nn.equivariant_init(jax.random.PRNGKey(0), params, axes, 1, 2)
    with pytest.raises(ValueError, match="pool='sum'"):
        nn.equivariant_apply(layer, features, axes, pool="sum")
    with pytest.raises(ValueError, match=r"blocks \['v', 'w'\], and \['w'\] came"):
        nn.equivariant_apply(layer, {"w": features["w"]}, {"w": axes["w"]})
    with pytest.raises(ValueError, match=r"'v', block 'v': drawn for \[1\] channels .* and 2 and"):
        nn.equivariant_apply(layer, channels(params, 2), axes)
    with pytest.raises(ValueError, match=r"block 'v': drawn for .*'ab->ab'.*'ab->ba'"):
        nn.equivariant_apply(layer, features, {"w": (None, "a"), "v": ("a", "a")})
    with pytest.raises(ValueError, match=r"'v' is \(3, 3\), and 2 dimensions and one of channels"):
        nn.equivariant_apply(layer, params, axes)
    # two hidden layers of one width, taken for each other
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["u"]
    deep = draw({"w": (2, 3), "v": (3, 3), "u": (3, 1)})
    wrong = {"w": (None, "a"), "v": ("b", "a"), "u": ("b", None)}
    with pytest.raises(ValueError, match="not an axis of this function"):
        trace.check(net, deep, wrong, (X,))


@pytest.mark.slow
def test_tells_on_which_classes_a_network_was_trained():
    """200 networks of two hidden layers of 8 units, each of one of five pairs of digits."""
    digits = load_digits()
    x = digits.images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16
    rng = np.random.default_rng(0)
    task = rng.permutation(np.arange(200) % 5)
    rows = np.stack([
        np.concatenate([rng.choice(np.flatnonzero(digits.target == 2 * t + c), 32) for c in (0, 1)])
        for t in task
    ])  # fmt: skip
    labels = np.repeat([0.0, 1.0], 32)

    shapes = {"w0": (16, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 1), "b2": (1,)}
    start = {
        name: jnp.asarray(rng.normal(size=(200, *s)) / np.sqrt(s[0] if len(s) > 1 else np.inf))
        for name, s in shapes.items()
    }
    start = jax.tree.map(lambda w: w.astype(jnp.float32), start)

    def fit(loss, params, steps, rate):
        tx = optax.adam(rate)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    def train(params, x):
        loss = lambda p: optax.sigmoid_binary_cross_entropy(mlp(p, x)[:, 0], labels).mean()
        fitted = fit(loss, params, 200, 0.02)
        return fitted, ((mlp(fitted, x)[:, 0] > 0) == (labels > 0)).mean()

    nets, accuracy = jax.jit(jax.vmap(train))(start, jnp.asarray(x[rows], jnp.float32))
    assert accuracy.mean() > 0.97
    axes = {
        "w0": (None, "h0"), "b0": ("h0",), "w1": ("h0", "h1"), "b1": ("h1",), "w2": ("h1", None),
        "b2": (None,),
    }  # fmt: skip
    one = jax.tree.map(lambda w: w[0], nets)
    keys = jax.random.split(KEY)
    theta = {
        "layer": nn.equivariant_init(keys[0], one, axes, 1, 8),
        "head": nn.invariant_init(keys[1], one, axes, 8, 5),
    }

    def logits(theta, nets):
        def of_one(params):
            h = nn.equivariant_apply(theta["layer"], channels(params), axes)
            return nn.invariant_apply(theta["head"], jax.tree.map(jax.nn.relu, h), axes)

        return jax.vmap(of_one)(nets)

    known, unseen = (jax.tree.map(lambda w: w[at], nets) for at in (slice(140), slice(140, 200)))

    def loss(theta):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits(theta, known), task[:140])
        return nll.mean()

    theta = jax.jit(lambda theta: fit(loss, theta, 200, 3e-3))(theta)
    right = (logits(theta, unseen).argmax(-1) == task[140:]).mean()
    assert right > 0.2 + 4 * np.sqrt(0.2 * 0.8 / 60)
