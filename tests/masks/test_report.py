"""What a mask does to a model: counts, FLOPs of inference and training, two masks compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkit import masks, trace

KEY = jax.random.key(0)


def conv(x, w, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


def x(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --------------------------------------------------------------------------- FLOPs, by hand


def test_dense_and_convolutional_layers():
    def apply_fn(p, image):
        h = jax.nn.relu(conv(image, p["stem"], 2) + p["bias"])  # 8 -> 4
        h = conv(h, p["depthwise"], 1, 6)
        h = h @ p["pointwise"][0, 0]
        return h.mean((1, 2)) @ p["head"]

    params = shapes(
        stem=(3, 3, 3, 6), bias=(6,), depthwise=(3, 3, 1, 6), pointwise=(1, 1, 6, 10), head=(10, 2)
    )
    found = masks.costs(apply_fn, params, x(5, 8, 8, 3))
    positions = 5 * 16
    assert found.entries == {
        "stem": positions,
        "bias": 0,
        "depthwise": positions,
        "pointwise": positions,
        "head": 5,
    }
    assert found.between == 0
    assert found.notes == ()
    dense = 2 * (positions * (162 + 54 + 60) + 5 * 20)
    assert masks.flops(found) == dense
    assert masks.flops(found, training=True) == 3 * dense
    mask = {n: jnp.ones(p.shape, bool) for n, p in params.items()}
    mask["pointwise"] = jnp.arange(60).reshape(1, 1, 6, 10) < 6
    assert masks.flops(found, mask) == dense - 2 * positions * 54


def gpt(layers, width, context, vocabulary, scan):
    """A GPT of plain kernels, its blocks in a Python loop or in a scan."""

    def block(h, p):
        q, k, v = (h @ p[n] for n in ("q", "k", "v"))
        h = h + jax.nn.softmax(q @ k.T / width**0.5) @ v @ p["o"]
        return h + jax.nn.gelu(h @ p["up"]) @ p["down"]

    def apply_fn(p, tokens):
        h = p["wte"][tokens]
        if scan:
            h, _ = lax.scan(lambda h, p: (block(h, p), None), h, p["blocks"])
        else:
            for i in range(layers):
                h = block(h, jax.tree.map(lambda w, i=i: w[i], p["blocks"]))
        return h @ p["wte"].T

    square, stack = (layers, width, width), lambda *s: (layers, *s)
    blocks = shapes(
        q=square,
        k=square,
        v=square,
        o=square,
        up=stack(width, 4 * width),
        down=stack(4 * width, width),
    )
    params = {"wte": x(vocabulary, width), "blocks": blocks}
    return apply_fn, params, jax.ShapeDtypeStruct((context,), jnp.int32)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_a_transformer_costs_what_the_closed_form_says(scan, sparsity):
    sizes = {"layers": 3, "width": 8, "context": 10, "vocabulary": 17}
    apply_fn, params, tokens = gpt(*sizes.values(), scan)
    found = masks.costs(apply_fn, params, tokens)
    density = jax.tree.map(lambda _: 1 - sparsity, params) | {"wte": 1.0}
    per_token = masks.flops(found, density) / 10
    assert per_token == pytest.approx(masks.transformer_flops(**sizes, sparsity=sparsity))
    assert found.between == 2 * 3 * 10 * 10 * 8


def test_calls_loops_and_branches():
    recurrent = lambda p, xs: lax.scan(
        lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["ring"]), None), jnp.zeros((2, 3)), xs
    )[0]
    params = shapes(**{"in": (4, 3), "ring": (3, 3)})
    found = masks.costs(jax.jit(jax.checkpoint(recurrent)), params, x(7, 2, 4))
    assert found.entries == {"in": 14, "ring": 14}
    fused = lambda p, h: (
        sum(h @ part for part in jnp.split(p["qkv"], 3, axis=1))
        + h @ jnp.concatenate([p["a"], p["c"]], 1)[:, :4]
    )
    found = masks.costs(fused, shapes(qkv=(4, 12), a=(4, 2), c=(4, 2)), x(5, 4))
    assert found.entries == {"qkv": 5, "a": 5, "c": 5}
    low_rank = masks.costs(lambda p, h: h @ (p["a"] @ p["c"]), shapes(a=(4, 2), c=(2, 6)), x(5, 4))
    assert low_rank.between == 4 * 2 * 6 + 5 * 4 * 6  # the product of the leaves, and with it
    assert low_rank.entries == {"a": 0, "c": 0}
    branch = lambda p, h: lax.cond(h[0, 0] > 0, lambda: h @ p["a"] @ p["a"], lambda: h @ p["c"])
    found = masks.costs(branch, shapes(a=(4, 4), c=(4, 4)), x(5, 4))
    assert found.entries == {"a": 10, "c": 0}
    assert found.notes[0].startswith("the dearest branch of `cond` at ")
    loop = lambda p, h: lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p["a"], h)
    found = masks.costs(loop, shapes(a=(4, 4)), x(5, 4))
    assert found.entries == {"a": 5}
    assert found.notes[0].startswith("one iteration of `while` at ")


def test_experts_see_a_share_of_the_rows_each():
    apply_fn = lambda p, h: lax.ragged_dot(h, p["experts"], jnp.array([3, 1, 4], jnp.int32))
    found = masks.costs(apply_fn, shapes(experts=(3, 4, 6)), x(8, 4))
    assert found.entries == {"experts": pytest.approx(8 / 3)}
    assert masks.flops(found) == pytest.approx(2 * 8 * 4 * 6)


def test_training_costs_what_is_in_force_on_the_way():
    params = shapes(w=(10, 10))
    found = masks.costs(lambda p, h: h @ p["w"], params, x(1, 10))
    dense = masks.flops(found)
    assert dense == 200
    end = {"w": jnp.arange(100).reshape(10, 10) < 10}
    assert masks.flops(found, end) == 20
    assert masks.flops(found, end, training=True) == 60
    # dense for half of the training, sparse for the other: inference is as cheap, training is not
    mean = {"w": (1.0 + end["w"]) / 2}
    assert masks.flops(found, mean, training=True) == pytest.approx(3 * (200 + 20) / 2)
    # RigL's account: (3 f_S every + 2 f_S + f_D) / (every + 1)
    every = 100
    rigl = masks.flops(found, end, training=True, dense_gradients=1 / (every + 1))
    assert rigl == pytest.approx((3 * 20 * every + 2 * 20 + 200) / (every + 1))
    with pytest.raises(ValueError, match="dense_gradients is 2"):
        masks.flops(found, end, dense_gradients=2)
    with pytest.raises(ValueError, match="99 entries at 'w', and 100 are due"):
        masks.flops(found, {"w": jnp.ones(99)})
    with pytest.raises(ValueError, match="another structure"):
        masks.flops(found, {"v": jnp.ones(100)})


# -------------------------------------------------------------------------------- the table


def test_the_report_counts_what_numpy_counts_and_sums_up():
    params = {"up": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, "down": jnp.ones((8, 2))}
    mask = masks.topk(masks.random(KEY, params), sparsity=0.7)
    found = masks.report(params, mask)
    due = {"down": mask["down"], "up/bias": mask["up"]["bias"], "up/kernel": mask["up"]["kernel"]}
    assert {r.path: r.kept for r in found.rows} == {
        path: np.count_nonzero(m) for path, m in due.items()
    }
    assert [r.chosen for r in found.rows] == [True, False, True]
    assert found.chosen.kept == found.rows[0].kept + found.rows[2].kept == round(0.3 * 64)
    assert found.all.kept == found.chosen.kept + 8
    assert found.inference is None


def test_the_report_tells_inference_from_training():
    params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 1))}
    mask = {"up": jnp.ones((2, 2), bool), "down": jnp.array([[True], [False]])}
    apply_fn = lambda p, h: jax.nn.relu(h @ p["up"]) @ p["down"]
    dense = jax.tree.map(lambda m: jnp.ones_like(m, float), mask)
    found = masks.report(params, mask, apply_fn=apply_fn, args=(x(1, 2),), average=dense)
    assert found.inference == (12, 10)
    assert found.training == (36, 36)  # it was dense throughout
    assert str(found).splitlines()[0].split() == [
        "leaf",
        "shape",
        "entries",
        "kept",
        "sparsity",
        "effective",
        "FLOPs",
    ]
    assert "inference: 10 of 12 FLOPs (83.33 %)" in str(found)
    assert "training step: 36 of 36 FLOPs (100.00 %)" in str(found)
    by_leaf = {r.path: (r.kept, r.effective, r.flops) for r in found.rows}
    assert by_leaf == {"up": (4, 2, 8), "down": (1, 1, 2)}
    assert (found.chosen.effective, found.chosen.flops) == (3, 10)
    static = masks.report(params, mask, apply_fn=apply_fn, args=(x(1, 2),))
    assert static.training == (36, 30)
    sorts = lambda p, h: apply_fn(p, jnp.sort(h))
    noted = masks.report(params, mask, apply_fn=sorts, args=(x(1, 2),))
    assert "note: not followed: `sort`" in str(noted)


def test_the_order_of_execution_and_the_costs_agree_on_the_leaves():
    apply_fn, params, tokens = gpt(2, 4, 3, 5, True)
    concrete = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    tapped = trace.taps(apply_fn)(concrete, jnp.zeros(3, jnp.int32))[1]
    counted = masks.costs(apply_fn, params, tokens)
    used = {f"blocks/{n}" for n, uses in counted.entries["blocks"].items() if uses}
    assert used == {path for path in tapped if path.startswith("blocks")}


# ------------------------------------------------------------------------------ two masks


def test_hamming_and_iou_in_closed_form():
    rng = np.random.default_rng(0)
    a, b = ({"w": jnp.asarray(rng.random((300, 400)) < 0.2)} for _ in range(2))
    a["bias"] = b["bias"] = jnp.ones(7, bool)
    differ = float(masks.hamming(a, b))
    assert differ == pytest.approx(float(np.mean(np.asarray(a["w"]) != np.asarray(b["w"]))))
    overlap = float(jax.jit(masks.iou)(a, b))
    both, either = (np.sum(f(a["w"], b["w"])) for f in (np.logical_and, np.logical_or))
    assert overlap == pytest.approx(both / either)
    assert overlap == pytest.approx(0.2 / (2 - 0.2), abs=0.005)  # chance
    assert differ == pytest.approx(2 * 0.2 * 0.8, abs=0.005)
    assert float(masks.iou(a, a)) == 1
    assert float(masks.hamming(a, a)) == 0
    flipped = {**a, "w": ~a["w"]}
    assert (float(masks.iou(a, flipped)), float(masks.hamming(a, flipped))) == (0, 1)
    none = {"w": jnp.zeros((2, 2), bool)}
    assert float(masks.iou(none, none)) == 1
    assert float(masks.hamming(a, {**a, "bias": ~a["bias"]}, where="bias")) == 1
    with pytest.raises(ValueError, match="second mask does not fit"):
        masks.iou(a, none)
