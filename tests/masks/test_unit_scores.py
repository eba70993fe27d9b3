"""Scores of units: which leaves count, and what each criterion is on small cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks, trace, tree
from jaxkit.trace import Axis, Concat, Prod, Role
from tests.zoo import convolution
from tests.zoo.model import randomize

RNG = np.random.default_rng(0)


def conv(x, w, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def small(params, x):
    """Two convolutions and a dense layer, with everything between them."""
    h = jax.nn.relu(conv(x, params["one"]["w"]) + params["one"]["b"])
    h = jax.nn.relu(conv(h, params["two"]["w"]) + params["two"]["b"])
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return h.reshape(len(x), -1) @ params["out"]


PARAMS = {
    "one": {"w": RNG.standard_normal((3, 3, 2, 4)), "b": 0.3 * RNG.standard_normal(4)},
    "two": {"w": RNG.standard_normal((3, 3, 4, 5)), "b": 0.3 * RNG.standard_normal(5)},
    "out": RNG.standard_normal((2 * 2 * 5, 3)),
}
PARAMS = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
X = jnp.asarray(RNG.standard_normal((6, 4, 4, 2)), jnp.float32)
AXES, ROLES = trace.axes(small, PARAMS, X), trace.roles(small, PARAMS, X)
FIRST, SECOND = trace.named(AXES)


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-5, **tolerance})


# ------------------------------------------------------------------------- which leaves count


def test_the_kernels_that_produce_a_unit_count():
    rows = masks.unit_matrices(PARAMS, AXES, ROLES)
    assert list(rows) == [FIRST, SECOND]
    np.testing.assert_array_equal(rows[FIRST], PARAMS["one"]["w"].reshape(-1, 4).T)
    np.testing.assert_array_equal(rows[SECOND], PARAMS["two"]["w"].reshape(-1, 5).T)


def test_those_that_consume_it_on_request():
    rows = masks.unit_matrices(PARAMS, AXES, ROLES, role="consumed")
    np.testing.assert_array_equal(
        rows[FIRST], jnp.moveaxis(PARAMS["two"]["w"], 2, 0).reshape(4, -1)
    )
    # the flattened dimension is (2, 2, 5)
    expected = jnp.moveaxis(PARAMS["out"].reshape(4, 5, 3), 1, 0).reshape(5, -1)
    np.testing.assert_array_equal(rows[SECOND], expected)


def test_products_and_blocks_are_taken_apart():
    """A fused q | k kernel, each heads x size."""
    params = {"qk": jnp.arange(2 * 12.0).reshape(2, 12)}
    block = Prod((Axis("heads", 2), Axis("size", 3)))
    axes = {"qk": (None, Concat((block, block)))}
    rows = masks.unit_matrices(params, axes, {"qk": Role("kernel", ("consumed", "produced"))})
    q, k = np.asarray(params["qk"])[:, :6], np.asarray(params["qk"])[:, 6:]
    for h in range(2):
        own = np.concatenate([q[:, 3 * h : 3 * h + 3].ravel(), k[:, 3 * h : 3 * h + 3].ravel()])
        np.testing.assert_array_equal(np.sort(rows["heads"][h]), np.sort(own))
    for s in range(3):
        own = np.concatenate([q[:, s::3].ravel(), k[:, s::3].ravel()])
        np.testing.assert_array_equal(np.sort(rows["size"][s]), np.sort(own))


def test_pinned_axes_have_no_score():
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2))}
    net = lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"]
    args = (jnp.ones((1, 2)),)
    axes, roles = trace.axes(net, params, *args), trace.roles(net, params, *args)
    assert masks.unit_norm(params, axes, roles) == {}


# ---------------------------------------------------------------------------- coupled groups


def test_a_residual_stream_is_one_group():
    """A ResNet of a stem and two blocks; the groups that a dependency graph finds, by hand.

    Removing an output channel of the stem removes that of the last convolution and the last
    BatchNorm of every block of the stream, and an input channel of all that read the stream: its
    blocks' first convolutions, and the shortcut and the first convolution of the block that ends
    it.
    """
    apply_fn, params, args = convolution.RESNET.build()
    params = randomize(params)
    axes = trace.axes(apply_fn, params, *args)
    size = {axis.size: name for name, axis in trace.named(axes).items()}
    norm = lambda at: {(f"{at}/norm/{leaf}", 0) for leaf in ("scale", "bias", "mean", "var")}
    produced = lambda at: {(f"{at}/kernel", 3), *norm(at)}
    stream = produced("stem") | produced("block0/conv1")
    stream |= {(f"{at}/kernel", 2) for at in ("block0/conv0", "block1/conv0", "block1/shortcut")}
    second = produced("block1/conv1") | produced("block1/shortcut") | produced("block2/conv1")
    second |= {("block2/conv0/kernel", 2), ("head/kernel", 0)}
    inner = produced("block0/conv0") | {("block0/conv1/kernel", 2)}
    for units, group in ((5, stream), (13, second), (7, inner)):
        mask = masks.units(params, {size[units]: jnp.arange(units) != 2}, axes)
        mask = {path: np.asarray(m) for path, m in tree.flatten(mask).items()}
        hit = {
            (path, d)
            for path, m in mask.items()
            for d in range(m.ndim)
            if m.shape[d] == units and not m.take(2, axis=d).any()
        }
        assert hit == group
        assert all(m.all() for path, m in mask.items() if path not in dict(group))


def test_one_leaf_of_a_group_has_no_mask_of_its_own():
    apply_fn, params, args = convolution.RESNET.build()
    axes = trace.axes(apply_fn, params, *args)
    (name,) = (n for n, axis in trace.named(axes).items() if axis.size == 5)
    part = {"block0/conv1/kernel:3", "stem/kernel:3"} - {name}
    with pytest.raises(ValueError, match=r"no axis is named '.*/kernel:3'; the nearest: '"):
        masks.units(params, dict.fromkeys(part, jnp.ones(5, bool)), axes)


def test_a_score_of_a_stream_sums_over_all_that_produce_it():
    apply_fn, params, args = convolution.RESNET.build()
    params = randomize(params)
    axes, roles = trace.axes(apply_fn, params, *args), trace.roles(apply_fn, params, *args)
    size = {axis.size: name for name, axis in trace.named(axes).items()}
    l1 = masks.unit_norm(params, axes, roles, order=1)[size[5]]
    makers = (params["stem"]["kernel"], params["block0"]["conv1"]["kernel"])
    close(l1, sum(np.abs(w).sum((0, 1, 2)) for w in makers))
    scales = (params["stem"]["norm"]["scale"], params["block0"]["conv1"]["norm"]["scale"])
    close(masks.bn_scale(params, axes)[size[5]], sum(np.abs(s) for s in scales))


def test_masked_and_shrunk_networks_agree():
    """With BatchNorm: the whole group is zero, so that no unit emits relu(beta)."""
    apply_fn, params, args = convolution.RESNET.build()
    params = randomize(params)
    axes, roles = trace.axes(apply_fn, params, *args), trace.roles(apply_fn, params, *args)
    run = jax.jit(apply_fn, compiler_options={"xla_backend_optimization_level": 0})
    for scores in (masks.unit_norm(params, axes, roles, order=1), masks.bn_scale(params, axes)):
        keep = masks.topk(scores, sparsity=jax.tree.map(lambda _: 0.5, scores), where="**")
        small, sizes, _ = masks.shrink(params, keep, axes)
        assert sorted(sizes.values()) == [2, 4, 6, 6, 8]
        masked = run(masks.apply(params, masks.units(params, keep, axes)), *args)
        close(run(small, *args), masked, rtol=1e-4, atol=1e-5 * float(jnp.abs(masked).max()))


def test_a_layer_without_units_is_refused_by_name():
    scores = masks.unit_norm(PARAMS, AXES, ROLES)
    keep = {name: s > (1e9 if name == SECOND else 0) for name, s in scores.items()}
    with pytest.raises(ValueError, match="axis 'two/w:3': all of its 5 units are masked"):
        masks.shrink(PARAMS, keep, AXES)


# -------------------------------------------------------------------------------- of weights


def test_norms_equal_numpy_and_rank_as_they_do():
    """The order in which structured pruning by L1 and L2 norms along the output removes filters."""
    for order in (1, 2):
        scores = masks.unit_norm(PARAMS, AXES, ROLES, order=order)
        for name, w in ((FIRST, PARAMS["one"]["w"]), (SECOND, PARAMS["two"]["w"])):
            flat = np.asarray(w).reshape(-1, w.shape[-1])
            close(scores[name], np.linalg.norm(flat, order, axis=0))
    with pytest.raises(ValueError, match="order=3, and 1 or 2 was due"):
        masks.unit_norm(PARAMS, AXES, ROLES, order=3)


def test_the_filter_at_the_median_goes_first():
    v = RNG.standard_normal((3, 3, 2, 1))
    params = {"w": jnp.asarray(v * np.array([0.0, 1.0, 10.0]), jnp.float32)}
    scores = masks.fpgm(params, {"w": (None, None, None, "c")}, None)["c"]
    close(scores, np.linalg.norm(v) * np.array([11.0, 10.0, 19.0]))
    # the least norm would have gone by magnitude
    assert int(scores.argmin()) == 1
    norms = masks.unit_norm(params, {"w": (None, None, None, "c")}, None)["c"]
    assert int(norms.argmin()) == 0


def test_group_lasso_and_its_gradient():
    penalty = lambda p: masks.group_lasso(p, AXES, ROLES)
    n = {"one": 18, "two": 36}
    norms = {
        k: np.linalg.norm(PARAMS[k]["w"].reshape(-1, PARAMS[k]["w"].shape[-1]), axis=0) for k in n
    }
    close(penalty(PARAMS), sum(np.sqrt(n[k]) * norms[k].sum() for k in n))
    grads = jax.jit(jax.grad(penalty))(PARAMS)
    for k in n:
        close(grads[k]["w"], np.sqrt(n[k]) * PARAMS[k]["w"] / norms[k])
        assert not grads[k]["b"].any()
    dead = {**PARAMS, "one": {**PARAMS["one"], "w": PARAMS["one"]["w"].at[..., 1].set(0)}}
    grads = jax.grad(penalty)(dead)
    assert jnp.isfinite(grads["one"]["w"]).all() and not grads["one"]["w"][..., 1].any()


def test_the_penalty_on_scales_has_the_subgradient_of_the_paper():
    params = {"scale": jnp.array([2.0, -3.0, 0.0])}
    loss = lambda p: sum(
        s.sum() for s in masks.bn_scale(p, {"scale": ("c",)}, where="scale").values()
    )
    np.testing.assert_array_equal(jax.grad(loss)(params)["scale"], [1, -1, 0])


# ----------------------------------------------------------------------------------- of data


def test_taylor_is_activation_times_gradient():
    """Against the definition: activations after the nonlinearity, perturbed in the network."""
    loss_fn = lambda params, x: jnp.mean(jnp.sin(small(params, x)) ** 2)

    def gated(gates, params, x):
        h = jax.nn.relu(conv(x, params["one"]["w"]) + params["one"]["b"]) + gates[0]
        h = jax.nn.relu(conv(h, params["two"]["w"]) + params["two"]["b"]) + gates[1]
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.mean(jnp.sin(h.reshape(len(x), -1) @ params["out"]) ** 2)

    zeros = [jnp.zeros((6, 4, 4, 4)), jnp.zeros((6, 4, 4, 5))]
    grads = jax.jit(jax.grad(gated))(zeros, PARAMS, X)
    h = jax.nn.relu(conv(X, PARAMS["one"]["w"]) + PARAMS["one"]["b"])
    acts = [h, jax.nn.relu(conv(h, PARAMS["two"]["w"]) + PARAMS["two"]["b"])]
    scores = jax.jit(lambda p: masks.taylor(loss_fn, p, X, AXES, ROLES))(PARAMS)
    for name, a, g in zip((FIRST, SECOND), acts, grads, strict=True):
        mean = np.abs((a * g).mean((0, 1, 2)))
        close(scores[name], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)


def test_a_unit_that_never_fires_is_never_active():
    params = {**PARAMS, "one": {**PARAMS["one"], "b": PARAMS["one"]["b"].at[2].set(-1e3)}}
    scores = masks.apoz(small, params, (X,), AXES, ROLES)
    h = jax.nn.relu(conv(X, params["one"]["w"]) + params["one"]["b"])
    close(scores[FIRST], (np.asarray(h) != 0).mean((0, 1, 2)))
    assert scores[FIRST][2] == 0 and (scores[FIRST][:2] > 0).all()
    # the dense layer reads the second layer after pooling
    h = jax.nn.relu(conv(h, params["two"]["w"]) + params["two"]["b"])
    pooled = np.asarray(h).reshape(6, 2, 2, 2, 2, 5).max((2, 4))
    close(scores[SECOND], (pooled != 0).mean((0, 1, 2)))


def test_ranks_of_feature_maps():
    """The first filter sums what is constant along a side, so that its maps have rank one."""
    w = jnp.zeros((3, 3, 2, 4)).at[1, 1, 0, 0].set(1).at[1, 1, 1, 1].set(1).at[1, 1, 0, 2].set(-1)
    params = {**PARAMS, "one": {"w": w, "b": jnp.array([0.0, 0.0, 0.0, 1.0])}}
    x = jnp.abs(X).at[..., 0].set(jnp.arange(1.0, 5)[None, :, None])
    scores = masks.hrank(small, params, (x,), AXES, ROLES)
    assert scores.keys() == {FIRST}  # no convolution reads the second
    assert scores[FIRST].tolist() == [1.0, 4.0, 0.0, 1.0]
    dense = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
    net = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    args = (jnp.ones((2, 2)),)
    axes, roles = trace.axes(net, dense, *args), trace.roles(net, dense, *args)
    with pytest.raises(ValueError, match="no convolution over two dimensions reads an axis"):
        masks.hrank(net, dense, args, axes, roles)
    net, linear = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}
    axes, roles = trace.axes(net, linear, *args), trace.roles(net, linear, *args)
    with pytest.raises(ValueError, match="no kernel consumes an axis"):
        masks.apoz(net, linear, args, axes, roles)
