"""The measurements against direct computation; the verdicts on models whose illness is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkit.init.advise import advise
from jaxkit.init.signals import signals
from tests.counting import counting

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 12))


def chain(phi):
    def apply_fn(params, x):
        for kernel in params[:-1]:
            x = phi(x @ kernel)
        return x @ params[-1]

    return apply_fn


def kernels(depth, scale, width=12, seed=2):
    w = jax.random.normal(jax.random.key(seed), (depth, width, width))
    return list(w * scale / width**0.5)


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def found(advice):
    return {verdict.kind: verdict.path for verdict in advice.verdicts}


# ------------------------------------------------------------------------------- measurements


def test_numbers_equal_those_of_direct_computation():
    first = kernels(1, 1.0)[0].at[:, :3].set(-1.0)
    x = jnp.abs(X)  # so that three units are dead
    params = {"first": first, "second": kernels(1, 1.0, seed=3)[0][:, :5]}
    apply_fn = lambda p, x: jnp.tanh(jax.nn.relu(x @ p["first"]) @ p["second"])
    loss = lambda out: jnp.sum(jnp.square(out)) / 7
    seen = signals(apply_fn, params, x, loss=loss)

    def outputs(shift):
        a = x @ params["first"] + shift[0]
        h = jax.nn.relu(a)
        b = h @ params["second"] + shift[1]
        return jnp.tanh(b) + shift[2], (a, h, b)

    shift = [jnp.zeros((32, 12)), jnp.zeros((32, 5)), jnp.zeros((32, 5))]
    (out, (a, h, b)), _ = outputs(shift), None
    grads = jax.grad(lambda shift: loss(outputs(shift)[0]))(shift)
    rms = lambda z: np.sqrt(np.mean(np.square(np.asarray(z, np.float64))))

    def correlation(y):
        y = np.asarray(y, np.float64)
        gram = y @ y.T
        return gram[~np.eye(32, dtype=bool)].mean() / np.diag(gram).mean()

    rows = [*seen.layers.values(), seen.result]
    assert list(seen.layers) == ["first", "second"]
    for row, y, g in zip(rows, (a, b, out), grads, strict=True):
        close(row.output, rms(y))
        close(row.gradient, rms(g))
        close(row.norm, np.linalg.norm(g))
        close(1 - row.apart, correlation(y), rtol=1e-4)
    close(seen.layers["second"].input, rms(h))
    close(seen.layers["second"].dead, float((np.asarray(h) == 0).all(0).mean()))
    assert seen.layers["second"].dead >= 3 / 12
    close(seen.layers["second"].zeros, (h == 0).mean())
    close(seen.layers["first"].leaf, rms(first))
    close(seen.classes, np.bincount(np.argmax(out, 1), minlength=5) / 32)


def test_no_squares_that_underflow():
    params = [jnp.eye(12) * 1e-15, jnp.eye(12) * 1e-15]
    seen = signals(chain(lambda x: x), params, X)
    close(seen.result.output, 1e-30 * X.std(), rtol=0.1)
    close(seen.layers["0"].gradient / seen.result.gradient, 1e-15)
    assert 0.9 < seen.result.apart < 1.1


def test_jit_is_one_program_and_traces_do_not_grow_with_depth():
    def counted(depth):
        calls = []
        apply_fn = lambda p, x: (calls.append(1), chain(jnp.tanh)(p, x))[1]
        measure, traces = counting(lambda p, x: signals(apply_fn, p, x))
        eager = signals(chain(jnp.tanh), kernels(depth, 1.0), X)
        jax.tree.map(close, measure(kernels(depth, 1.0), X), eager)
        measure(kernels(depth, 2.0), X)
        assert len(traces) == 1
        return len(calls)

    assert counted(2) == counted(5) <= 3


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_shards_equal_one_device(how):
    params = kernels(3, 1.4)
    apply_fn = chain(jax.nn.relu)
    want = signals(apply_fn, params, X)
    fit = lambda p, x: signals(apply_fn, p, x, axis_name="data")
    if how == "pmap":
        out = jax.pmap(fit, "data", in_axes=(None, 0))(params, X.reshape(2, 16, 12))
        out = jax.tree.map(lambda x: x[1], out)
    else:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        specs = {"in_specs": (spec(), spec("data")), "out_specs": spec(), "check_vma": False}
        out = jax.jit(jax.shard_map(fit, mesh=mesh, **specs))(params, X)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4), out, want)


def test_scan_equals_a_loop_and_is_told_layer_by_layer():
    a, b = kernels(3, 1.0), kernels(3, 1.0, seed=5)

    def block(h, layer):
        return jnp.tanh(h @ layer["a"]) @ layer["c"], None

    def scanned(params, x):
        return jax.lax.scan(jax.checkpoint(block), x, params)[0]

    def looped(params, x):
        for layer in params:
            x = block(x, layer)[0]
        return x

    stacked = advise(scanned, {"a": jnp.stack(a), "c": jnp.stack(b)}, X)
    plain = advise(looped, [{"a": v, "c": w} for v, w in zip(a, b, strict=True)], X)
    assert [row.path for row in stacked.rows] == ["a[0]", "c[0]", "a[1]", "c[1]", "a[2]", "c[2]"]
    assert [row.path for row in plain.rows] == ["0/a", "0/c", "1/a", "1/c", "2/a", "2/c"]
    for one, other in zip(stacked.rows, plain.rows, strict=True):
        close(one[2:-1], other[2:-1], rtol=1e-4)


def test_shared_leaves_are_averaged_over_their_uses():
    w = kernels(1, 1.0)[0]
    seen = signals(lambda p, x: (x @ p["w"]) @ p["w"], {"w": w}, X)
    one, two = X @ w, X @ w @ w
    close(seen.layers["w"].output, (jnp.sqrt((one**2).mean()) + jnp.sqrt((two**2).mean())) / 2)

    def rnn(p, x):
        return jax.lax.scan(lambda h, _: (h @ p["w"], None), x, None, length=2)[0]

    jax.tree.map(close, signals(rnn, {"w": w}, X), seen)


# ----------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("factor", "what"), [(0.5, "dies"), (2.0, "explodes")])
def test_the_leaf_is_the_one_of_the_closed_form(factor, what):
    # 2^-14 < 1e-4 < 2^-13: after the 14th layer, index 13, and 14 back from the last, 19 - 14.
    advice = advise(chain(lambda x: x), [factor * jnp.eye(12)] * 20, X)
    assert found(advice) == {f"forward-{what}": "13", f"backward-{what}": "5"}
    forward, backward = (verdict.text for verdict in advice.verdicts)
    assert f"by a factor of {factor:g} a layer" in forward and "at 13" in forward
    assert "at 5" in backward and "(6 of the 20 leaves" in backward
    table = str(advice)
    assert forward in table and [line[:2] for line in table.splitlines() if "<" in line[-1:]] == [
        "5 ",
        "13",
    ]


def test_relu_at_the_wrong_gain_and_at_the_right_one():
    wrong = advise(chain(jax.nn.relu), kernels(40, 1.0, width=64), X @ kernels(1, 3.0, 64)[0][:12])
    assert 20 <= int(found(wrong)["forward-dies"]) <= 32  # 2^(-l/2) is 1e-4 at 26.6
    assert "he_normal" in wrong.verdicts[0].text
    x = jax.random.normal(KEY, (32, 64))
    right = advise(chain(jax.nn.relu), kernels(40, 2**0.5, width=64), x)
    assert not {"forward-dies", "backward-dies", "forward-explodes"} & found(right).keys()


def test_healthy_nets_have_no_verdict():
    advice = advise(chain(jnp.tanh), kernels(5, 1.2, width=64), jax.random.normal(KEY, (32, 64)))
    assert advice.verdicts == ()
    assert "No leaf stands out" in str(advice)


def test_alike():
    def apply_fn(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel + 1.0)
        return x

    advice = advise(apply_fn, kernels(12, 0.2), X)
    path = found(advice)["alike"]
    at = [row.path for row in advice.rows].index(path)
    assert all(row.apart < 1e-6 for row in advice.rows[at:]) and advice.rows[at - 1].apart > 1e-6
    same = advise(apply_fn, kernels(2, 1.0), jnp.ones((8, 12)))
    assert found(same)["alike"] == "0"


def test_residual_branches_and_heads_that_start_at_zero():
    def apply_fn(p, x):
        h = x @ p["stem"]
        for block in p["blocks"]:
            h = h + block["alpha"] * jnp.tanh(h @ block["up"]) @ block["down"]
        return h @ p["head"]

    w = kernels(8, 1.0)
    blocks = [{"up": w[i], "down": w[i + 3], "alpha": jnp.zeros(())} for i in range(3)]
    params = {"stem": w[6], "blocks": blocks, "head": w[7]}
    advice = advise(apply_fn, params, X)
    assert found(advice) == {"no-gradient": "blocks/0/up"}  # the signal goes through the skips
    zero = advise(apply_fn, params | {"head": jnp.zeros((12, 4))}, X)
    assert found(zero) == {"zero-leaf": "head"}
    assert np.isnan(zero.classes).all() and "undefined (ties)" in str(zero)


def test_cut_and_dead():
    a, b, c = kernels(3, 1.0)
    cut = advise(lambda p, x: jax.lax.stop_gradient(jnp.tanh(x @ p[0])) @ p[1], [a, b], X)
    assert found(cut) == {"no-gradient": "0"} and np.isnan(cut.rows[0].output)
    dead = advise(lambda p, x: jax.nn.relu(jnp.abs(x) @ p[0] - 2) @ p[1], [a, b], X)
    row = dead.rows[1]
    assert ("dead-units" in found(dead)) == (row.dead >= 0.3)
    shift = jnp.where(jnp.arange(12) < 6, -100.0, 0.0)
    half = advise(lambda p, x: jax.nn.relu(x @ p[0] + shift) @ p[1], [a, b], X)
    assert half.rows[1].dead == 0.5 and found(half)["dead-units"] == "1"
    gone = advise(lambda p, x: jax.nn.relu(x @ p[0] - 100) @ p[1] @ p[2], [a, b, c], X)
    assert found(gone)["forward-dies"] == "0" and "is zero at 0" in gone.verdicts[0].text
    assert found(gone)["backward-dies"] == "0"


def test_class_bias():
    w = kernels(2, 1.0)
    biased = lambda p, x: jnp.tanh(x @ p[0]) @ p[1] + 9 * jax.nn.one_hot(3, 12)
    advice = advise(biased, w, X)
    assert found(advice) == {"class-bias": "(output)"}
    assert advice.classes.argmax() == 3 and "class 3" in str(advice)
    assert not advise(biased, w, X[:4]).verdicts  # four of four may be chance


def test_not_finite():
    a, b = kernels(2, 1.0)
    advice = advise(chain(jnp.tanh), [a, b.at[0, 0].set(jnp.nan)], X)
    assert found(advice) == {"not-finite": "1"} and "itself holds NaN" in advice.verdicts[0].text
    advice = advise(chain(jnp.exp), [a, 1e38 * jnp.ones((12, 12)), b], X)
    assert found(advice) == {"not-finite": "1"} and "overflows" in advice.verdicts[0].text
    advice = advise(lambda p, x: jnp.log(x @ p[0]) @ p[1], [a, b], X)
    assert found(advice) == {"not-finite": "1"} and "first to read" in advice.verdicts[0].text


# ------------------------------------------------------------------------------ any front end


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        h = embed(tokens)
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = nn.Conv(8, (3,))(h)
        return embed.attend(nn.LayerNorm()(h))


def test_flax_with_attention_and_a_tied_embedding():
    tokens = jax.random.randint(KEY, (8, 6), 0, 11)
    model = Net()
    params = model.init(KEY, tokens)
    advice = advise(model.apply, params, tokens)
    attention = "params/MultiHeadDotProductAttention_0/"
    assert [row.path for row in advice.rows] == [
        *(f"{attention}{name}/kernel" for name in ("query", "key", "value", "out")),
        "params/Conv_0/kernel",
    ]
    assert all(np.isfinite(row[2:8]).all() for row in advice.rows)
    with_embedding = advise(model.apply, params, tokens, where=lambda path, w: w.ndim > 1)
    assert with_embedding.rows[0].path == "params/Embed_0/embedding"
    assert np.isnan(with_embedding.rows[0].input)


def test_nnx():
    graph, state = nnx.split(nnx.Linear(12, 3, rngs=nnx.Rngs(0)))
    advice = advise(lambda state, x: nnx.merge(graph, state)(x), state, X)
    assert [row.path for row in advice.rows] == ["kernel"] and not advice.verdicts


# ------------------------------------------------------------------------------------ refusals


def test_bad_input():
    params = kernels(2, 1.0)
    apply_fn = chain(jnp.tanh)
    with pytest.raises(ValueError, match="two examples at least"):
        advise(apply_fn, params, X[:1])
    with pytest.raises(ValueError, match="the first axis of every array"):
        advise(lambda p, b: apply_fn(p, b["x"]), params, {"x": X, "mask": jnp.ones(5)})
    with pytest.raises(TypeError, match="use signals there"):
        jax.jit(lambda p: advise(apply_fn, p, X).rows[0].input)(params)
    with pytest.raises(ValueError, match=r"'1' feeds no operation"):
        advise(lambda p, x: x @ p[0], params, X, where="*")
    with pytest.raises(ValueError, match="no weight to watch"):
        advise(lambda p, x: x, {}, X)
    with pytest.raises(ValueError, match="a scalar was due"):
        advise(apply_fn, params, X, loss=lambda out: out)
    loop = lambda p, x: jax.lax.while_loop(lambda s: s.sum() < 0, lambda s: s @ p[0], x) @ p[1]
    with pytest.raises(ValueError, match="'0' is used inside `while`"):
        advise(loop, params, X, where="*")
