"""LSUV: exact in one multiplication, in order, over any model; and what it refuses."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkit import tree
from jaxkit.init.calibrate import calibrate, lsuv
from jaxkit.trace.taps import taps
from tests.counting import counting

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (24, 6))


def relu_net(params, x):
    for kernel in params:
        x = jax.nn.relu(x @ kernel)
    return x


def kernels(depth, width=6, seed=2):
    return list(jax.random.normal(jax.random.key(seed), (depth, width, width)))


def deviations(apply_fn, params, *args):
    return {path: float(tap.output.std()) for path, tap in taps(apply_fn)(params, *args)[1].items()}


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_twenty_relu_layers_take_one_multiplication_each():
    calls, runs = 0, []

    def apply_fn(params, x):
        nonlocal calls
        calls += 1
        jax.debug.callback(lambda _: runs.append(1), x[0, 0])
        return relu_net(params, x)

    start = kernels(20, width=16)
    x = jax.random.normal(KEY, (64, 16))
    params, report = calibrate(apply_fn, start, x, tolerance=1e-5, warn=False)
    jax.effects_barrier()
    assert int(report.passes) == len(runs) == 2  # one to rescale, one to see that it has worked
    found = deviations(relu_net, params, x)
    close(list(found.values()), 1, rtol=1e-6)
    close(list(report.after.values()), 1, rtol=1e-6)
    for w, w0 in zip(params, start, strict=True):  # the direction of every leaf stays
        close(w / jnp.linalg.norm(w), w0 / jnp.linalg.norm(w0))
    # The same, layer by layer, as the paper has it.
    h = np.asarray(x, np.float64)
    for i, w in enumerate(np.asarray(start, np.float64)):
        std = (h @ w).std()
        close(report.before[str(i)], std)
        h = np.maximum(h @ w / std, 0)
    # A second call finds nothing to do: the same bits.
    again, report = calibrate(relu_net, params, x, warn=False)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert int(report.passes) == 1


def test_target_traced_and_order_of_the_batch():
    params = kernels(3)
    fit, traces = counting(lambda p, x, target: calibrate(relu_net, p, x, target=target))
    for target in (0.5, 2.0):
        out, report = fit(params, X, target)
        close(list(report.after.values()), target)
        close(list(deviations(relu_net, out, X).values()), target)
    assert len(traces) == 1
    assert list(report.before) == ["0", "1", "2"]
    shuffled, _ = fit(params, X[::-1], 2.0)
    jax.tree.map(close, shuffled, out)


def test_order_is_that_of_execution_and_other_leaves_stay():
    def apply_fn(p, x):
        return jnp.tanh(x @ p["z"]["kernel"] + p["z"]["bias"]) @ p["a"]["kernel"]

    a, z = kernels(2)
    params = {"a": {"kernel": a}, "z": {"kernel": z, "bias": jnp.ones(6)}, "n": jnp.array(3)}
    out, report = calibrate(apply_fn, params, X)
    assert list(report.before) == ["z/kernel", "a/kernel"]
    close(list(deviations(apply_fn, out, X).values()), 1)
    assert out["z"]["bias"] is params["z"]["bias"] or (out["z"]["bias"] == 1).all()
    assert out["n"] == 3 and out["n"].dtype == params["n"].dtype
    only, report = calibrate(apply_fn, params, X, where="a/**")
    np.testing.assert_array_equal(only["z"]["kernel"], z)
    assert list(report.before) == ["a/kernel"]


def test_center_differs_only_where_the_mean_is_not_zero():
    def apply_fn(p, x):
        h = jax.nn.relu(x @ p["0"]["w"] + p["0"]["b"])
        return h @ p["1"]["w"] + p["1"]["b"]

    params = {str(i): {"w": w, "b": jnp.zeros(6)} for i, w in enumerate(kernels(2))}
    even = jnp.concatenate([X, -X])  # the first layer's outputs have mean zero, the second's do not
    plain, _ = calibrate(apply_fn, params, even)
    centered, _ = calibrate(apply_fn, params, even, center=True)
    jax.tree.map(close, plain["0"], centered["0"])
    close(plain["1"]["w"], centered["1"]["w"])
    mean = float(apply_fn(plain, even).mean())
    assert abs(mean) > 0.01
    close(centered["1"]["b"], -mean, rtol=1e-4)
    close(apply_fn(centered, even).mean(), 0)
    close(apply_fn(centered, even).std(), deviations(apply_fn, centered, even)["1/w"])


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_shards_equal_one_device(how):
    params = kernels(3)
    want, report = calibrate(relu_net, params, X, warn=False)
    fit = lambda p, x: calibrate(relu_net, p, x, warn=False, axis_name="data")
    if how == "pmap":
        parts = X[:20].reshape(2, 10, 6)
        want, report = calibrate(relu_net, params, X[:20], warn=False)
        out = jax.pmap(fit, "data", in_axes=(None, 0))(params, parts)
        out = jax.tree.map(lambda x: x[1], out)
    else:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        out = jax.jit(
            jax.shard_map(
                fit,
                mesh=mesh,
                in_specs=(spec(), spec("data")),
                out_specs=spec(),
                check_vma=False,
            )
        )(params, X)
    jax.tree.map(close, out[0], want)
    close(list(out[1].before.values()), list(report.before.values()))


# ------------------------------------------------------------------------------ any front end


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_lsuv_of_a_flax_convnet():
    x = jax.random.normal(KEY, (5, 4, 4, 2))
    model = ConvNet()
    params = jax.tree.map(lambda w: w + 0.5, model.init(KEY, x))
    out, report = lsuv(KEY, model.apply, params, x, tolerance=1e-5)
    close(list(deviations(model.apply, out, x).values()), 1)
    assert not report.skipped and int(report.passes) == 2
    for path, leaf in tree.flatten(out).items():
        if path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:  # (inputs and taps, outputs) with orthonormal columns, or rows, times one number
            w = np.asarray(leaf).reshape(-1, leaf.shape[-1])
            gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
            close(gram / gram[0, 0], np.eye(len(gram)), rtol=1e-4)
    again, _ = lsuv(KEY, model.apply, params, x, tolerance=1e-5)
    jax.tree.map(np.testing.assert_array_equal, out, again)


def test_nnx_and_equinox():
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jnp.tanh))
    apply_fn = lambda state, x: nnx.merge(graph, state)(x)
    out, _ = calibrate(apply_fn, state, X)
    close(list(deviations(apply_fn, out, X).values()), 1)
    arrays, static = eqx.partition(eqx.nn.MLP(6, 2, 5, 1, key=KEY), eqx.is_array)
    apply_fn = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
    out, _ = calibrate(apply_fn, arrays, X)
    close(list(deviations(apply_fn, out, X).values()), 1)


def test_layers_of_a_scan_are_calibrated_one_by_one():
    def apply_fn(params, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["w"])[0]

    stacked = jnp.stack(kernels(4))
    out, report = calibrate(apply_fn, {"w": stacked}, X)
    want, separate = calibrate(relu_net, kernels(4), X)
    close(out["w"], jnp.stack(want))
    close(report.before["w"], jnp.stack(list(separate.before.values())))
    assert str(report).splitlines()[-1].startswith("w[3]")
    drawn, _ = lsuv(KEY, apply_fn, {"w": stacked}, X)
    for w in drawn["w"]:
        close(w @ w.T / (w @ w.T)[0, 0], np.eye(6), rtol=1e-4)


def test_bfloat16_keeps_its_dtype():
    params = [w.astype(jnp.bfloat16) for w in kernels(3, width=16)]
    x = jax.random.normal(KEY, (64, 16), jnp.bfloat16)
    out, report = calibrate(relu_net, params, x, tolerance=0.02)
    assert all(w.dtype == jnp.bfloat16 for w in out)
    close(list(report.after.values()), 1, rtol=0.02)


def test_a_leaf_that_is_not_used_as_it_is_takes_more_passes_or_is_named():
    shifted = lambda p, x: x @ (p["w"] + 0.2 * jnp.eye(6)) @ p["v"]
    v, w = kernels(2)
    # Rescaling the output is not rescaling the leaf here: the passes approach the target.
    out, report = calibrate(shifted, {"v": v, "w": w}, X, tolerance=0.05)
    assert int(report.passes) == 3
    close(float((X @ (out["w"] + 0.2 * jnp.eye(6))).std()), float(report.after["w"]))
    normalized = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"]))
    with pytest.raises(ValueError, match=r"(?s)after 3 passes.*'w' has the deviation .* off by -"):
        calibrate(normalized, {"w": w}, X)
    _, report = jax.jit(lambda p, x: calibrate(normalized, p, x))({"w": w}, X)
    close(report.after["w"], normalized({"w": w}, X).std())  # under jit the report says so


# ------------------------------------------------------------------------------------ refusals


def test_dead_and_infinite_layers_are_named():
    w = jnp.abs(kernels(1)[0])
    dead = lambda p, x: jax.nn.relu(-jnp.abs(x) @ p["a"]) @ p["c"]
    with pytest.raises(ValueError, match="'c' is constant"):
        calibrate(dead, {"a": w, "c": w}, X)
    _, report = jax.jit(lambda p, x: calibrate(dead, p, x))({"a": w, "c": w}, X)
    assert report.after["c"] == 0
    with pytest.raises(ValueError, match="'c' is not finite"):
        calibrate(lambda p, x: jnp.log(x @ p["a"]) @ p["c"], {"a": w, "c": w}, X)


def test_shared_leaves_are_errors():
    w = kernels(1)[0]
    with pytest.raises(ValueError, match="'w' is shared by 2 operations"):
        calibrate(lambda p, x: x @ p["w"] @ p["w"], {"w": w}, X)
    rnn = lambda p, x: jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ p["w"]), None), x[0], x)[0]
    with pytest.raises(ValueError, match="'w' is shared by every iteration of a scan"):
        calibrate(rnn, {"w": w}, jnp.ones((3, 5, 6)))


def test_leaves_that_cannot_be_reached():
    w, v = kernels(2)
    added = lambda p, x: x @ p["w"] + p["shift"]
    params = {"w": w, "shift": v[:1]}
    _, report = calibrate(added, params, X)
    assert [path for path, _ in report.skipped] == ["shift"] and "shift is left out" in str(report)
    table = {"w": w, "table": 3 * v}
    looked = lambda p, tokens: p["table"][tokens] @ p["w"]
    _, report = calibrate(looked, table, jnp.arange(6))
    assert report.skipped[0][0] == "table" and list(report.after) == ["w"]
    out, _ = calibrate(looked, table, jnp.arange(6), where="*")
    close(out["table"].std(), 1)
    with pytest.raises(ValueError, match="'shift' goes into `add`"):
        calibrate(added, params, X, where="*")
    with pytest.raises(ValueError, match="'v' feeds no operation"):
        calibrate(lambda p, x: x @ p["w"], {"w": w, "v": v}, X, where="*")
    with pytest.raises(ValueError, match=r"'v' shares its operation with 'w'"):
        calibrate(lambda p, x: x @ (p["v"] @ p["w"]), {"v": v, "w": w}, X, where="*")
    branch = lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)
    with pytest.raises(ValueError, match="'w' is used inside `cond`"):
        calibrate(branch, {"w": w}, X, where="*")
    with pytest.raises(ValueError, match="no weight to calibrate"):
        calibrate(lambda p, x: x, {}, X)


def test_one_function_called_twice_has_two_leaves():
    layer = jax.jit(lambda w, x: x @ w)
    out, report = calibrate(lambda p, x: layer(p[1], layer(p[0], x)), kernels(2), X)
    assert list(report.after) == ["0", "1"]
    close(X @ out[0] / (X @ out[0]).std(), X @ out[0])


def test_a_batch_of_one_row():
    with pytest.raises(ValueError, match=r"'0': its output of shape .* has one row"):
        calibrate(relu_net, kernels(1), X[:1])
    image = X[:1].reshape(1, 6, 1) * jnp.ones(6)  # one example with six positions
    calibrate(relu_net, kernels(1), image)


def test_normalized_outputs_warn():
    norm = lambda h: (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-6)
    model = lambda p, x: norm(x @ p["a"]) @ p["c"]
    params = dict(zip("ac", kernels(2), strict=True))
    with pytest.warns(UserWarning, match=r"does not change what the model returns .*: a$"):
        calibrate(model, params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, params, X, warn=False)
        calibrate(relu_net, kernels(2), X)
