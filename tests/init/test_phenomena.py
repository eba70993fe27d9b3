"""What the papers saw, seen again: on digits, in the limit of wide layers, and at all corners."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from jaxkit import init

KEY = jax.random.key(0)


@functools.cache
def digits(train=1400):
    """Training and test images as rows of pixels in [0, 1], with their labels."""
    data = load(train=train, test=397)
    flat = (jnp.asarray(x).reshape(len(x), -1) for x in (data.x, data.x_test))
    return *flat, jnp.asarray(data.y), jnp.asarray(data.y_test)


# ------------------------------------------------------------------------------ edge of chaos


@pytest.mark.slow
def test_fifty_layers_train_at_the_edge_of_chaos_alone():
    """tanh, width 64: ordered (0.8), at the edge, chaotic (2.5); Gaussian weights."""
    x, x_test, y, y_test = digits()
    depth, n, sigma_b = 50, 64, 0.1
    edge = init.edge_of_chaos(jnp.tanh, sigma_b)
    normal = jax.nn.initializers.normal

    def start(sigma_w):
        first, rest, biases, head = jax.random.split(KEY, 4)
        return {
            "kernels": sigma_w / 8 * jnp.concatenate(
                [normal(1.0)(first, (1, 64, n)), normal(1.0)(rest, (depth - 1, n, n))]
            ),
            "biases": normal(sigma_b)(biases, (depth, n)),
            "head": normal(n**-0.5)(head, (n, 10)),
        }  # fmt: skip

    def logits(params, x):
        layer = lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None)
        return jax.lax.scan(layer, x, (params["kernels"], params["biases"]))[0] @ params["head"]

    def loss(params, rows):
        out = logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

    tx = optax.adam(2e-4)

    @jax.jit
    @jax.vmap
    def train(params):
        def step(state, key):
            params, opt_state = state
            rows = jax.random.randint(key, (32,), 0, len(x))
            updates, opt_state = tx.update(jax.grad(loss)(params, rows), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        state = (params, tx.init(params))
        params = jax.lax.scan(step, state, jax.random.split(KEY, 400))[0][0]
        return (logits(params, x_test).argmax(1) == y_test).mean()

    accuracy = train(jax.vmap(start)(jnp.array([0.8, edge.sigma_w, 2.5])))
    assert accuracy[1] > 0.75
    assert accuracy[0] < 0.35 and accuracy[2] < 0.35


# ---------------------------------------------------------------------- initial guessing bias


@pytest.mark.slow
def test_untrained_relu_networks_guess_few_classes_of_digits():
    """Five layers of 200: relu gives most images one class, tanh a sixth or so."""
    x = digits()[0]
    x = (x - x.mean(0)) / jnp.maximum(x.std(0), 1e-3)

    @functools.partial(jax.jit, static_argnums=0)
    def largest(phi, gain):
        def one(key):
            h = x
            for k, m in zip(jax.random.split(key, 6), [200] * 5 + [10], strict=True):
                h = h @ jax.random.normal(k, (h.shape[1], m)) * gain / h.shape[1] ** 0.5
                h = phi(h) if m == 200 else h
            return init.class_fractions(h).max()

        return jax.lax.map(one, jax.random.split(KEY, 40), batch_size=4)

    relu, tanh = largest(jax.nn.relu, 2**0.5), largest(jnp.tanh, 1.0)
    error = lambda values: float(values.std()) / 40**0.5
    assert abs(float(relu.mean()) - 0.638) < 4 * error(relu)  # with other draws, in numpy: 0.638
    assert abs(float(tanh.mean()) - 0.166) < 0.02  # 0.166
    assert float(relu.mean()) - float(tanh.mean()) > 5 * (error(relu) + error(tanh))


# --------------------------------------------------------------------------- self-pretraining


@pytest.mark.slow
def test_self_pretraining_helps_where_labels_are_few():
    """A Transformer over the 8 rows of the digits: 200 labels, masked rows before.

    The mean gain of three seeds is at least two points of test accuracy.
    """
    x, x_test, y, y_test = digits()
    x, x_test = x.reshape(-1, 8, 8), x_test.reshape(-1, 8, 8)
    d, heads, labelled = 32, 4, 200
    tx = optax.adam(1e-3)
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = {
        "qkv": spec(2, d, 3 * d),
        "out": spec(2, d, d),
        "up": spec(2, d, 2 * d),
        "down": spec(2, 2 * d, d),
    }

    def model(inputs, outputs):
        ends = {"encoder": {"inputs": spec(inputs, d), "positions": spec(8, d)}}
        return {"encoder": ends["encoder"] | {"layers": layer}, "decoder": spec(d, outputs)}

    lecun = functools.partial(jax.nn.initializers.variance_scaling, 1.0, "fan_in", "normal")
    draw = init.rules(
        ("**/positions", jax.nn.initializers.normal(0.1)),
        ("**/layers/*", lecun(batch_axis=0)),
        ("**", lecun()),
    )

    def normal(x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)

    def encode(params, x):
        def block(x, w):
            parts = (normal(x) @ w["qkv"]).reshape(*x.shape[:2], 3, heads, d // heads)
            mixed = jax.nn.dot_product_attention(*(parts[:, :, i] for i in range(3)))
            x = x + mixed.reshape(x.shape) @ w["out"]
            return x + jax.nn.gelu(normal(x) @ w["up"]) @ w["down"], None

        x = x @ params["inputs"] + params["positions"]
        return normal(jax.lax.scan(block, x, params["layers"])[0])

    def fill_in(params, key):
        rows, mask = jax.random.split(key)
        batch = x[jax.random.randint(rows, (32,), 0, len(x))]
        mask = init.span_mask(mask, batch.shape[:2])
        out = encode(params["encoder"], init.hide(batch, mask)) @ params["decoder"]
        return init.masked_loss(out, batch, mask)

    def classify(params, x):
        return encode(params["encoder"], x).mean(1) @ params["decoder"]

    def label(params, key):
        rows = jax.random.randint(key, (32,), 0, labelled)
        out = classify(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(out, y[rows]).mean()

    def train(loss, params, keys):
        def step(state, key):
            params, opt_state = state
            updates, opt_state = tx.update(jax.grad(loss)(params, key), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    @jax.jit
    @jax.vmap
    def both(key):
        first, second, third, fourth = jax.random.split(key, 4)
        scratch = draw(first, model(8, 10))
        pretrained = train(fill_in, draw(second, model(9, 8)), jax.random.split(third, 1500))
        warm, report = init.transplant(
            pretrained, scratch, where="encoder/**", adapt={"encoder/inputs": init.crop}
        )
        assert [path for path, _ in report.skipped] == ["decoder"]
        assert [path for path, *_ in report.adapted] == ["encoder/inputs"]
        steps = jax.random.split(fourth, 200)
        accuracy = lambda p: (classify(p, x_test).argmax(1) == y_test).mean()
        return [accuracy(train(label, params, steps)) for params in (scratch, warm)]

    scratch, warm = both(jax.random.split(KEY, 3))
    assert float(warm.mean() - scratch.mean()) >= 0.02


# ---------------------------------------------------------------------- state spaces that copy


@pytest.mark.slow
def test_mimetic_state_spaces_begin_to_copy_at_once():
    """Copy 8 of 10 symbols, two Mamba layers: after 100 steps the usual start is at chance still.

    (Seen over 200 steps as well: 0.33 to 0.38, and 0.10 to 0.17. How many steps each takes to 95%
    is not tested.)
    """
    symbols, length, d, inner, state, rank = 10, 8, 32, 64, 16, 2
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = {
        "inputs": spec(d, 2 * inner),
        "conv": spec(4, 1, inner),
        "x_proj": spec(inner, rank + 2 * state),
        "dt": spec(rank, inner),
        "dt_bias": spec(inner),
        "A_log": spec(inner, state),
        "skip": spec(inner),
        "out": spec(inner, d),
    }
    shapes = {"embed": spec(symbols + 1, d), "first": layer, "second": layer}
    shapes |= {"head": spec(d, symbols)}
    log_steps = lambda key, shape: jax.random.uniform(
        key, shape, minval=math.log(1e-3), maxval=math.log(1e-1)
    )
    usual = init.rules(  # those of Mamba
        ("**/A_log", lambda key, shape, dtype: jnp.log(jnp.ones(shape).cumsum(1))),
        (
            "**/dt_bias",
            lambda key, shape, dtype: jnp.log(jnp.expm1(jnp.exp(log_steps(key, shape)))),
        ),
        ("**/skip", jax.nn.initializers.ones),
        ("**/conv", lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.5, 0.5)),
        ("embed", jax.nn.initializers.normal(1.0)),
        ("**", jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")),
    )
    mimetic = init.mimetic_ssm(
        64, a_log="**/A_log", dt="**/dt", dt_bias="**/dt_bias", conv="**/conv",
        dt_b_c="**/x_proj", state=state,
    )  # fmt: skip

    def normal(x):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def mix(p, x):
        u, gate = jnp.split(normal(x) @ p["inputs"], 2, -1)
        before = jnp.pad(u, ((0, 0), (3, 0), (0, 0)))
        u = jax.nn.silu(sum(before[:, i : i + u.shape[1]] * p["conv"][i, 0] for i in range(4)))
        low, b, c = jnp.split(u @ p["x_proj"], (rank, rank + state), -1)
        dt = jax.nn.softplus(low @ p["dt"] + p["dt_bias"])

        def step(h, now):
            dt, u, b, c = now
            h = jnp.exp(-dt[..., None] * jnp.exp(p["A_log"])) * h
            h = h + (dt * u)[..., None] * b[:, None]
            return h, jnp.einsum("nds,ns->nd", h, c)

        start = jnp.zeros((len(x), inner, state))
        y = jax.lax.scan(step, start, [v.swapaxes(0, 1) for v in (dt, u, b, c)])[1]
        return x + ((y.swapaxes(0, 1) + p["skip"] * u) * jax.nn.silu(gate)) @ p["out"]

    def loss(params, key):
        word = jax.random.randint(key, (32, length), 0, symbols)
        stop = jnp.full((32, 1), symbols)
        x = params["embed"][jnp.concatenate([word, stop, word[:, :-1]], 1)]
        out = normal(mix(params["second"], mix(params["first"], x)))[:, length:] @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(out, word)
        return losses.mean(), (out.argmax(-1) == word).mean()

    tx = optax.adam(2e-3)

    @jax.jit
    @jax.vmap
    def train(params):
        def step(carry, key):
            params, opt_state = carry
            grads, accuracy = jax.grad(loss, has_aux=True)(params, key)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), accuracy

        keys = jax.random.split(KEY, 100)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1][-50:].mean()

    seeds = jax.random.split(KEY, 3)
    first = jax.vmap(lambda key: usual(key, shapes))(seeds)
    both = [first, jax.vmap(mimetic)(seeds, first)]
    accuracy = train(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *both))
    assert (accuracy[:3] < 0.13).all() and (accuracy[3:] > 0.18).all()


# ------------------------------------------------------------------------- the Gaussian limit


def outputs(sampler, draws=100, n=128):
    """Preactivations (draws, 2, n) of the third layer for two inputs of correlation 0.6."""
    a, b = np.linalg.qr(np.random.default_rng(0).normal(size=(n, 2)))[0].T
    x = jnp.asarray(math.sqrt(n / 2) * np.stack([a, 0.6 * a + 0.8 * b]), jnp.float32)

    def run(key):
        h = x
        for k in jax.random.split(key, 3):
            z = h @ sampler(k, (n, n), jnp.float32)
            h = jax.nn.relu(z)
        return z

    return np.asarray(jax.lax.map(run, jax.random.split(KEY, draws)), np.float64)


def excess_kurtosis(z):
    return float((z**4).mean() / (z**2).mean() ** 2 - 3)


@pytest.mark.slow
def test_preactivations_of_width_128_are_nearly_gaussian():
    """Excess kurtosis at most 0.7 with every pseudo-iid matrix, and large with rank one."""
    root = math.sqrt(2)
    iid = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    excess = lambda sampler, draws=1000: excess_kurtosis(outputs(sampler, draws)[:, 0])
    independent = excess(iid)
    assert abs(independent - 3 * ((1 + 5 / 128) ** 2 - 1)) < 0.08  # exactly, of two relu layers
    assert independent < excess(init.low_rank(0.5, root)) <= 0.7
    assert independent < excess(init.block_sparse(4, root)) <= 0.7
    assert abs(excess(init.orthogonal(root), 100)) <= 0.7
    # rank one: three factors N(0, 1) that all units share, and one of their own: 3^4 - 3 = 78
    assert excess(init.low_rank(1 / 128, root)) > 20


# ------------------------------------------------------------------------- intervals, exactly


def corners(lower, upper):
    """All corners of a box, in float64: (2^n, n)."""
    ends = np.stack([lower, upper]).astype(np.float64)
    picks = np.array(list(itertools.product((0, 1), repeat=ends.shape[1])))
    return ends[picks, np.arange(ends.shape[1])]


def test_bounds_are_those_of_all_corners():
    """A linear function takes its extremes at corners: one layer is exact, any signs.

    With weights that are not negative every corner of the next box is reached, so that a whole
    ReLU network of them is exact, too; with signs, the bounds enclose the truth.
    """
    rng = np.random.default_rng(0)
    low, high = (x := rng.normal(size=8)) - 0.3, x + rng.uniform(0, 1, 8)
    w1, w2, b1, b2 = (rng.normal(size=s) for s in ((8, 6), (6, 4), 6, 4))
    points = corners(low, high)

    def bounds(w1, w2):
        one = init.affine_bounds(*(jnp.asarray(v, jnp.float32) for v in (low, high, w1, b1)))
        return one, init.affine_bounds(*map(jax.nn.relu, one), jnp.asarray(w2), jnp.asarray(b2))

    def network(w1, w2):
        z = points @ w1 + b1
        return z, np.maximum(z, 0) @ w2 + b2

    (one, two), (z, out) = bounds(w1, w2), network(w1, w2)
    np.testing.assert_allclose(one, (z.min(0), z.max(0)), rtol=1e-5, atol=1e-5)
    assert (two[0] <= out.min(0) + 1e-5).all() and (two[1] >= out.max(0) - 1e-5).all()
    assert (two[1] - two[0] > 1.05 * np.ptp(out, axis=0)).any()  # loose, as intervals are
    (_, two), (_, out) = bounds(abs(w1), abs(w2)), network(abs(w1), abs(w2))
    np.testing.assert_allclose(two, (out.min(0), out.max(0)), rtol=1e-5, atol=1e-5)
    hidden = corners(*(np.maximum(np.asarray(v), 0) for v in one))  # the second layer by itself
    np.testing.assert_allclose(
        bounds(w1, w2)[1],
        ((hidden @ w2 + b2).min(0), (hidden @ w2 + b2).max(0)),
        rtol=1e-5,
        atol=1e-5,
    )
