"""trace.taps: what goes into the operation of a leaf and what comes out."""

import time
from functools import partial

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkit.trace.taps import taps

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------- the models


def mlp(params, x):
    h = jax.nn.relu(x @ params["z"]["kernel"] + params["z"]["bias"])
    return h @ params["a"]["kernel"] + params["a"]["bias"]


MLP = {
    "a": {"kernel": normal(1, 4, 2), "bias": normal(2, 2)},
    "z": {"kernel": normal(3, 3, 4), "bias": normal(4, 4)},
}


def gpt(params, tokens):
    """Two blocks in a Python loop, fused qkv split by a reshape, RMS norms, a tied embedding."""
    heads = 2
    h = params["embed"][tokens] + params["position"][: tokens.shape[-1]]
    norm = lambda h, g: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * g
    for block in params["blocks"]:
        q, k, v = jnp.split(norm(h, block["gain"]) @ block["qkv"], 3, -1)
        split = lambda t: t.reshape(*t.shape[:-1], heads, -1)
        w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", split(q), split(k)))
        h = h + jnp.einsum("bhqk,bkhd->bqhd", w, split(v)).reshape(h.shape) @ block["out"]
        h = h + jax.nn.gelu(h @ block["up"]) @ block["down"]
    return h @ params["embed"].T


def gpt_params(layers=2, d=4, vocab=7, length=5):
    block = lambda i: {
        "gain": 1 + 0.1 * normal(i, d),
        "qkv": normal(i + 1, d, 3 * d),
        "out": normal(i + 2, d, d),
        "up": normal(i + 3, d, 2 * d),
        "down": normal(i + 4, 2 * d, d),
    }
    return {
        "embed": normal(90, vocab, d),
        "position": normal(91, length, d),
        "blocks": [block(10 * i) for i in range(layers)],
    }


TOKENS = jnp.array([[1, 2, 3, 0, 6], [4, 4, 1, 5, 2]])


def stacked(params, x):
    """Layers by scan over remat blocks, with weights cast to another dtype and back outside."""

    @jax.checkpoint
    def block(h, layer):
        return h + jnp.tanh(h @ layer["kernel"] + layer["bias"])

    return lax.scan(lambda h, layer: (block(h, layer), None), x, params)[0]


STACKED = {"kernel": normal(5, 3, 4, 4), "bias": normal(6, 3, 4)}


def rnn(params, xs):
    """A cell in a scan over time; the kernels are shared by all steps."""

    def step(h, x):
        h = jnp.tanh(x @ params["into"] + h @ params["over"])
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], 4)), xs)[1] @ params["readout"]


RNN = {"into": normal(7, 3, 4), "over": normal(8, 4, 4), "readout": normal(9, 4, 2)}


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, stride in ((4, 1), (6, 2)):
            x = nn.Conv(features, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3)(x.mean((1, 2)))


IMAGES = normal(10, 2, 6, 6, 3)
CONVNET = ConvNet().init(KEY, IMAGES)

ZOO = {
    "mlp": (mlp, MLP, normal(11, 5, 3), 4),
    "gpt": (gpt, gpt_params(), TOKENS, 12),
    "stacked": (stacked, STACKED, normal(12, 2, 4), 2),
    "rnn": (rnn, RNN, normal(13, 6, 2, 3), 3),
    "convnet": (ConvNet().apply, CONVNET, IMAGES, 12),
}


@pytest.fixture(params=ZOO)
def model(request):
    return ZOO[request.param]


# ------------------------------------------------------------------------- values, order, cost


def test_taps_of_an_mlp_are_its_activations():
    x = normal(20, 5, 3)
    out, tapped = taps(mlp, "**")(MLP, x)
    before = x @ MLP["z"]["kernel"]
    h = jax.nn.relu(before + MLP["z"]["bias"])
    logits = h @ MLP["a"]["kernel"]
    by_hand = {
        "z/kernel": (x, before),
        "z/bias": (before, before + MLP["z"]["bias"]),
        "a/kernel": (h, logits),
        "a/bias": (logits, logits + MLP["a"]["bias"]),
    }
    assert list(tapped) == list(by_hand)
    for path, (into, out_of) in by_hand.items():
        equal(tapped[path].input, into)
        equal(tapped[path].output, out_of)
        assert not tapped[path].later
    assert [t.primitive for t in tapped.values()] == ["dot_general", "add"] * 2
    equal(out, tapped["a/bias"].output)


def test_the_default_is_the_weights():
    assert list(taps(mlp)(MLP, jnp.ones((1, 3)))[1]) == ["z/kernel", "a/kernel"]


def test_output_is_bit_for_bit_that_of_the_function(model):
    """Under jit. Eagerly, what is jitted inside runs operation by operation: to rounding."""
    apply_fn, params, x, count = model
    close(taps(apply_fn, "**")(params, x)[0], apply_fn(params, x))
    out, tapped = jax.jit(taps(apply_fn, "**"))(params, x)
    equal(out, jax.jit(apply_fn)(params, x))
    assert len(tapped) == count


def test_order_of_execution_survives_jit(model):
    apply_fn, params, x, _ = model
    order = list(jax.jit(taps(apply_fn))(params, x)[1])
    due = {
        mlp: ["z/kernel", "a/kernel"],
        gpt: ["embed", "position"]
        + [f"blocks/{i}/{name}" for i in (0, 1) for name in ("qkv", "out", "up", "down")],
        stacked: ["kernel"],
        rnn: ["into", "over", "readout"],
    }
    convnet = [f"params/{name}/kernel" for name in ("Conv_0", "Conv_1", "Dense_0")]
    assert order == due.get(apply_fn, convnet)


def flops(fn, *args):
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def test_costs_one_forward_pass(model):
    """Exactly the operations of the function, before the compiler's own fusions."""
    apply_fn, params, x, _ = model
    assert flops(taps(apply_fn, "**"), params, x) == flops(apply_fn, params, x) > 0


def test_compiled_it_costs_one_forward_pass_and_less_for_fewer_taps():
    compiled = lambda fn: jax.jit(fn).lower(wide, x).compile().cost_analysis()["flops"]
    layer = lambda n, m: {"kernel": jnp.ones((n, m)), "bias": jnp.ones(m)}
    wide = {"z": layer(32, 64), "a": layer(64, 64)}
    x = jnp.ones((16, 32))
    assert compiled(taps(mlp, "**")) <= 1.03 * compiled(mlp)
    first = compiled(lambda p, x: taps(mlp)(p, x)[1]["z/kernel"].output)
    assert first == compiled(lambda p, x: x @ p["z"]["kernel"])


def test_traces_a_twelve_layer_transformer_fast():
    params = gpt_params(layers=12)
    jax.make_jaxpr(gpt)(params, TOKENS)
    start = time.perf_counter()
    jax.eval_shape(taps(gpt), params, TOKENS)
    assert time.perf_counter() - start < 5


# ----------------------------------------------------------------------------- transformations


def test_vmap_over_examples_and_over_ensembles_equals_a_loop(model):
    apply_fn, params, x, _ = model
    xs = jnp.stack([x, x[..., ::-1]])
    single = jax.jit(taps(apply_fn, "**"))
    both = jax.jit(jax.vmap(taps(apply_fn, "**"), (None, 0)))(params, xs)
    for i in range(2):
        one = single(params, xs[i])
        jax.tree.map(lambda a, b, i=i: close(a[i], b, 1e-4), both, one)
    pair = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    both = jax.jit(jax.vmap(taps(apply_fn, "**"), (0, None)))(pair, x)
    for i in range(2):
        one = single(jax.tree.map(lambda p, i=i: p[i], pair), x)
        jax.tree.map(lambda a, b, i=i: close(a[i], b, 1e-4), both, one)


def test_devices_that_split_the_batch_give_the_same_taps():
    x = normal(25, 16, 3)
    out, tapped = taps(mlp, "**")(MLP, x)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split = PartitionSpec("batch")
    mapped = jax.shard_map(
        taps(mlp, "**"), mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split
    )
    got = jax.jit(mapped)(MLP, x)
    assert list(got[1]) == list(tapped)
    jax.tree.map(close, got, (out, tapped))
    sharded = jax.device_put(x, NamedSharding(mesh, split))
    got = jax.jit(taps(mlp, "**"))(MLP, sharded)
    jax.tree.map(close, got, (out, tapped))
    assert got[1]["a/kernel"].input.sharding.spec[0] == "batch"


def test_gradients_flow_through_output_and_taps(model):
    apply_fn, params, x, _ = model
    loss = lambda p: jnp.sum(taps(apply_fn, "**")(p, x)[0] ** 2)
    jax.tree.map(
        partial(close, rtol=1e-4),
        jax.jit(jax.grad(loss))(params),
        jax.jit(jax.grad(lambda p: jnp.sum(apply_fn(p, x) ** 2)))(params),
    )
    if apply_fn is mlp:
        through = jax.grad(lambda p: taps(mlp)(p, x)[1]["a/kernel"].input.sum())(params)
        hidden = lambda p: jax.nn.relu(x @ p["z"]["kernel"] + p["z"]["bias"]).sum()
        equal(through, jax.grad(hidden)(params))


def test_custom_derivatives_stay_where_no_operation_is_inside():
    """relu has the derivative 0 at 0 by its own rule, and max would have 1/2."""
    apply_fn = lambda p, x: jax.nn.relu(x @ p["w"])
    grad = jax.grad(lambda p: taps(apply_fn)(p, jnp.ones((1, 2)))[0].sum())
    equal(grad({"w": jnp.zeros((2, 3))})["w"], jnp.zeros((2, 3)))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w)


rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))  # straight through


def test_a_straight_through_weight_is_tapped_and_keeps_its_gradient():
    apply_fn = lambda p, x: x @ rounded(p["w"])
    params, x = {"w": 3 * normal(1, 3, 2)}, normal(2, 4, 3)
    loss = lambda p: taps(apply_fn)(p, x)[1]["w"].output.sum()
    close(jax.grad(loss)(params)["w"], jnp.broadcast_to(x.sum(0)[:, None], (3, 2)))
    equal(taps(apply_fn)(params, x)[1]["w"].output, x @ jnp.round(params["w"]))


def test_an_operation_inside_a_custom_derivative_is_found():
    @jax.custom_jvp
    def dense(x, w):
        return x @ w

    dense.defjvp(lambda primals, tangents: (dense(*primals), dense(tangents[0], primals[1])))
    params, x = {"w": normal(1, 3, 2)}, normal(2, 4, 3)
    _, tapped = taps(lambda p, x: dense(x, p["w"]))(params, x)
    equal(tapped["w"].output, x @ params["w"])


# ---------------------------------------------------------------------------------- structures


def test_scanned_layers_come_stacked():
    x = normal(21, 2, 4)
    tap = taps(stacked)(STACKED, x)[1]["kernel"]
    h = x
    for i in range(3):
        y = h @ STACKED["kernel"][i]
        close(tap.input[i], h)
        close(tap.output[i], y)
        h = h + jnp.tanh(y + STACKED["bias"][i])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_shared_kernel_in_a_scan_comes_stacked_over_time(reverse):
    xs, h = normal(22, 5, 2, 3), jnp.zeros((2, 4))

    def apply_fn(params, xs):
        step = lambda h, x: (jnp.tanh(x @ params["into"] + h @ params["over"]), None)
        return lax.scan(step, jnp.zeros((2, 4)), xs, reverse=reverse, unroll=2)[0]

    out, tapped = taps(apply_fn)({k: RNN[k] for k in ("into", "over")}, xs)
    assert list(tapped) == ["into", "over"]
    for t in range(5)[:: -1 if reverse else 1]:
        close(tapped["over"].input[t], h)
        close(tapped["into"].output[t], xs[t] @ RNN["into"])
        h = jnp.tanh(xs[t] @ RNN["into"] + h @ RNN["over"])
    close(out, h)


def test_a_cell_in_a_python_loop_has_later_taps():
    """An unrolled RNN: the first state is a constant, and the same taps come one by one."""

    def unrolled(params, xs):
        h = jnp.zeros((2, 4))
        for x in xs:
            h = jnp.tanh(x @ params["into"] + h @ params["over"])
        return h

    xs = normal(22, 5, 2, 3)
    params = {k: RNN[k] for k in ("into", "over")}
    loop, scan = taps(unrolled)(params, xs)[1], taps(rnn)(RNN, xs)[1]
    for path in ("into", "over"):
        first = loop[path]
        assert len(first.later) == 4
        jax.tree.map(close, jnp.stack([t.output for t in (first, *first.later)]), scan[path].output)


def test_scans_in_scans_stack_twice():
    params = {"w": normal(1, 2, 3, 4, 4)}

    def apply_fn(params, x):
        inner = lambda h, w: (jnp.tanh(h @ w), None)
        return lax.scan(lambda h, ws: (lax.scan(inner, h, ws)[0], None), x, params["w"])[0]

    tap = taps(apply_fn, "w")(params, jnp.ones((5, 4)))[1]["w"]
    assert tap.input.shape == tap.output.shape == (2, 3, 5, 4)
    h = jnp.ones((5, 4))
    for i in range(2):
        for j in range(3):
            close(tap.input[i, j], h)
            h = jnp.tanh(h @ params["w"][i, j])


def test_weights_that_a_loop_carries_along_or_indexes():
    """fori_loop: w is in the carry, unchanged, or stacked and indexed by the counter."""
    w = normal(1, 3, 4, 4)
    x = normal(2, 5, 4)

    def carried(params, x):
        body = lambda i, c: (c[0], jnp.tanh(c[1] @ c[0]))
        return lax.fori_loop(0, 3, body, (params["w"][0], x))[1]

    def indexed(params, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"][i]), x)

    for apply_fn, pick in ((carried, lambda i: w[0]), (indexed, lambda i: w[i])):
        out, tapped = taps(apply_fn, "w")({"w": w}, x)
        h = x
        for i in range(3):
            close(tapped["w"].output[i], h @ pick(i))
            h = jnp.tanh(h @ pick(i))
        close(out, h)


def test_experts_by_a_ragged_product():
    params, x, sizes = {"w": normal(1, 3, 4, 5)}, normal(2, 6, 4), jnp.array([1, 3, 2])
    out, tapped = taps(lambda p, x, n: lax.ragged_dot(x, p["w"], n))(params, x, sizes)
    equal(tapped["w"].input, x)
    equal(tapped["w"].output, out)
    close(out[1:4], x[1:4] @ params["w"][1])


def test_convolution():
    tapped = taps(ConvNet().apply, "**/Conv_*/kernel")(CONVNET, IMAGES)[1]
    kernel = CONVNET["params"]["Conv_0"]["kernel"]
    tap = tapped["params/Conv_0/kernel"]
    equal(tap.input, IMAGES)
    dims = ("NHWC", "HWIO", "NHWC")
    equal(
        tap.output, lax.conv_general_dilated(IMAGES, kernel, (1, 1), "SAME", dimension_numbers=dims)
    )
    assert tap.x_axes == (None, None, -1, None) and tap.y_axes == (None, None, None, -1)


def test_embedding_tied_to_the_readout():
    params = gpt_params()
    out, tapped = taps(gpt, "embed")(params, TOKENS)
    tap, (readout,) = tapped["embed"], tapped["embed"].later
    assert (tap.primitive, readout.primitive) == ("gather", "dot_general")
    equal(tap.input[..., 0], TOKENS)
    equal(tap.output, params["embed"][TOKENS])
    equal(readout.output, out)
    assert (tap.x_axes, tap.y_axes) == ((None, None), (None, -1))
    assert (readout.x_axes, readout.y_axes) == ((None, -1), (-1, None))
    one = taps(lambda p, t: p["embed"][t], "embed")(params, jnp.array(3))[1]["embed"]
    equal(one.output.ravel(), params["embed"][3])
    one = taps(lambda p, t: p["embed"][None, t], "embed")(params, jnp.array(3))[1]["embed"]
    equal(one.output.ravel(), params["embed"][3])


def test_gains_and_biases():
    params = {"add": normal(1, 3), "sub": normal(2, 3), "mul": normal(3, 3), "div": normal(4, 3)}
    apply_fn = lambda p, x: ((p["mul"] * (x + p["add"])) - p["sub"]) / p["div"]
    x = normal(5, 4, 3)
    tapped = taps(apply_fn, "*")(params, x)[1]
    assert [t.primitive for t in tapped.values()] == list(tapped) == ["add", "mul", "sub", "div"]
    equal(tapped["mul"].input, x + params["add"])
    assert all(t.x_axes == t.y_axes == (-1,) for t in tapped.values())


def test_on_the_way_to_its_operation_a_leaf_may_be_cast_moved_masked_and_normalized():
    w, x = normal(1, 6, 4), normal(2, 3, 4)
    mask = jnp.arange(24).reshape(6, 4) % 2 == 0
    standard = lambda w: (w - w.mean(1, keepdims=True)) / (w.std(1, keepdims=True) + 1e-3)
    ways = {
        "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32).T,
        "moved": lambda w: w.reshape(2, 3, 4).transpose(2, 1, 0).reshape(4, 6),
        "masked": lambda w: (w * mask).T,
        "where": lambda w: jnp.where(mask, w, 0).T,
        "standardized": jax.jit(lambda w: standard(w).T),
        "sliced": lambda w: w[1:3].T,
        "chosen": lambda w: lax.cond(True, lambda w: w * 2, lambda w: w, w).T,
    }
    for name, way in ways.items():
        out, tapped = taps(lambda p, x, way=way: x @ way(p["w"]), "w")({"w": w}, x)
        equal(tapped["w"].input, x)
        equal(tapped["w"].output, out)
        if name in ("cast", "masked", "where"):
            assert (tapped["w"].x_axes, tapped["w"].y_axes) == ((None, -1), (-1, None)), name


def test_weight_normalization_gives_both_leaves_the_product():
    params = {"v": normal(1, 3, 4), "g": normal(2, 4)}
    apply_fn = lambda p, x: x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0))
    out, tapped = taps(apply_fn, "*")(params, normal(3, 2, 3))
    equal(tapped["v"].output, out)
    equal(tapped["g"].output, out)


def test_learned_queries_are_the_input_of_their_kernel():
    params = {"latents": normal(1, 3, 4), "w": normal(2, 4, 5)}
    apply_fn = lambda p, x: jax.nn.softmax((p["latents"] @ p["w"]) @ x.T) @ x
    tap = taps(apply_fn, "w")(params, normal(3, 6, 5))[1]["w"]
    equal(tap.input, params["latents"])
    assert not tap.later


def test_batchnorm_statistics_dropout_keys_and_integers_travel_as_arguments():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))

    x = normal(1, 6, 3)
    variables = Net().init({"params": KEY, "dropout": KEY}, x)

    def apply_fn(params, stats, key, x):
        return Net().apply(
            {"params": params, "batch_stats": stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )

    args = variables["params"], variables["batch_stats"], jax.random.key(7), x
    (out, updates), tapped = jax.jit(taps(apply_fn))(*args)
    jax.tree.map(close, (out, updates), apply_fn(*args))
    assert list(tapped) == ["Dense_0/kernel", "Dense_1/kernel"]
    close(tapped["Dense_1/kernel"].output + variables["params"]["Dense_1"]["bias"], out)


# ---------------------------------------------------------------------------------- front ends


def test_every_front_end_gives_the_same_taps():
    x = normal(30, 5, 3)
    first, second = MLP["z"], MLP["a"]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(4)(x))
            return nn.Dense(2)(h)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    linen = {"params": {"Dense_0": first, "Dense_1": second}}
    module = Nnx(nnx.Rngs(0))
    graph, state = nnx.split(module)
    values = [first["bias"], first["kernel"], second["bias"], second["kernel"]]
    state = jax.tree.unflatten(jax.tree.structure(state), values)
    mlp_ = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    mlp_ = eqx.tree_at(
        lambda m: [a for layer in m.layers for a in (layer.weight, layer.bias)],
        mlp_,
        [a for v in (first, second) for a in (v["kernel"].T, v["bias"])],
    )
    arrays, static = eqx.partition(mlp_, eqx.is_array)
    haiku = hk.transform(lambda x: hk.nets.MLP([4, 2])(x))
    names = [
        (n, {"w": v["kernel"], "b": v["bias"]}) for n, v in zip("01", (first, second), strict=True)
    ]
    hk_params = {f"mlp/~/linear_{n}": v for n, v in names}
    assert jax.tree.structure(hk_params) == jax.tree.structure(haiku.init(KEY, x))

    fronts = {
        "linen": (Linen().apply, linen),
        "nnx": (lambda p, x: nnx.merge(graph, p)(x), state),
        "equinox": (lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays),
        "haiku": (lambda p, x: haiku.apply(p, None, x), hk_params),
    }
    due = list(taps(mlp)(MLP, x)[1].values())
    for name, (apply_fn, params) in fronts.items():
        out, tapped = taps(apply_fn)(params, x)
        assert len(tapped) == 2, name
        close(out, mlp(MLP, x))
        for got, want in zip(tapped.values(), due, strict=True):
            close(got.input, want.input)
            axis = {(-1, None): want.output, (None, -1): want.output}[got.x_axes]
            close(got.output, axis if got.output.shape == axis.shape else axis.T)


def test_flax_scan_remat_and_attention():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)(x)
            return x + nn.Dense(4)(nn.LayerNorm()(x)), None

    class Net(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block), {"params": self.axis}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    x = normal(1, 2, 5, 4)
    for axis in (0, 1):
        params = Net(axis).init(KEY, x)
        out, tapped = jax.jit(taps(Net(axis).apply))(params, x)
        equal(out, jax.jit(Net(axis).apply)(params, x))
        names = ["query", "key", "value", "out"]
        attention = "params/layers/MultiHeadDotProductAttention_0"
        due = [*(f"{attention}/{n}/kernel" for n in names), "params/layers/Dense_0/kernel"]
        assert sorted(tapped) == sorted(due) and list(tapped)[-2:] == due[-2:]
        query, dense = tapped[f"{attention}/query/kernel"], tapped[due[-1]]
        assert query.output.shape == (3, 2, 5, 2, 2) and query.output.dtype == jnp.bfloat16
        assert dense.input.shape == (3, 2, 5, 4)
        last = jnp.take(params["params"]["layers"]["Dense_0"]["kernel"], 2, axis)
        close(dense.output[2], dense.input[2] @ last, 1e-4)


# -------------------------------------------------------------------------------- what it says


def test_what_cannot_be_tapped_is_listed_with_the_reason():
    def apply_fn(params, x):
        h = lax.cond(x.sum() > 0, lambda h: h @ params["branch"], lambda h: h, x)
        h = lax.while_loop(lambda h: h.sum() > 9, lambda h: h @ params["loop"], h)
        h = jnp.concatenate([h, jnp.broadcast_to(params["token"], (1, 3))])
        return h @ params["good"], params["returned"], 2 * params["alone"]

    names = ["branch", "loop", "good", "never", "returned", "alone"]
    params = {name: normal(i, 3, 3) for i, name in enumerate(names)} | {"token": normal(8, 1, 3)}
    x = normal(9, 2, 3)
    out, tapped = taps(apply_fn)(params, x)
    assert list(tapped) == ["good"]
    equal(out, apply_fn(params, x))
    with pytest.raises(ValueError) as error:
        taps(apply_fn, "*")(params, x)
    text = str(error.value)
    assert "'never' is never read" in text
    assert "'branch' is used inside `cond` at " in text and "test_taps.py" in text
    assert "'loop' is used inside `while` at " in text
    assert "'token' goes into `concatenate` at " in text
    assert "'returned' is " in text and "'alone' is read, but meets no activation" in text
    assert "'good'" not in text


def test_an_opaque_function_is_not_followed():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = PartitionSpec("d")
    dense = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    with pytest.raises(ValueError, match="'w' goes into `shard_map` at "):
        taps(lambda p, x: dense(x, p["w"]), "w")({"w": normal(1, 3, 3)}, normal(2, 2, 3))

    def host(p, x):
        shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), shape, x, p["w"])

    with pytest.raises(ValueError, match="'w' goes into `pure_callback` at "):
        taps(host, "w")({"w": normal(1, 3, 3)}, normal(2, 2, 3))


def test_a_state_that_starts_from_a_leaf_is_an_activation():
    def apply_fn(params, xs):
        step = lambda h, x: (jnp.tanh(x + h @ params["w"]), None)
        return lax.scan(step, params["start"], xs)[0]

    params = {"w": normal(1, 3, 3), "start": normal(2, 2, 3)}
    xs = normal(3, 4, 2, 3)
    tap = taps(apply_fn, "w")(params, xs)[1]["w"]
    equal(tap.input[0], params["start"])
    with pytest.raises(ValueError, match="'start' changes in the carry of `scan` at "):
        taps(apply_fn, "start")(params, xs)


def test_a_state_that_starts_from_a_constant_is_an_activation():
    """The decay meets the state before any operation has touched it."""

    def apply_fn(params, xs):
        return lax.scan(lambda h, x: (h * params["decay"] + x, None), jnp.zeros((2, 3)), xs)[0]

    params, xs = {"decay": normal(1, 3)}, normal(2, 4, 2, 3)
    tap = taps(apply_fn, "*")(params, xs)[1]["decay"]
    close(tap.input[:3], jnp.stack([0 * xs[0], xs[0], xs[0] * params["decay"] + xs[1]]))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"args\[1\] is the str 'train', not an array; close over"):
        taps(lambda p, x, mode: x @ p["w"])({"w": jnp.ones((2, 2))}, jnp.ones((1, 2)), "train")
    with pytest.raises(TypeError, match=r"params leaf 'act' is .*, not an array; split"):
        taps(lambda p, x: x @ p["w"])({"w": jnp.ones((2, 2)), "act": jnp.tanh}, jnp.ones((1, 2)))
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        taps(lambda p, x, train: x @ p["w"] if train else x)({"w": jnp.ones((2, 2))}, 1.0, True)
    assert "close over those that are static" in "".join(error.value.__notes__)
    with pytest.raises(ValueError, match="matches no leaf"):
        taps(mlp, "**/nothing")(MLP, jnp.ones((1, 3)))


def test_leaves_that_are_no_floats_pass():
    params = {"w": normal(1, 3, 3), "step": jnp.array(3), "rate": 0.5, "key": jax.random.key(0)}

    def apply_fn(params, x):
        noise = jax.random.normal(jax.random.fold_in(params["key"], params["step"]), x.shape)
        return (x + params["rate"] * noise) @ params["w"]

    x = normal(2, 4, 3)
    out, tapped = taps(apply_fn)(params, x)
    assert list(tapped) == ["w"]
    close(out, apply_fn(params, x))
