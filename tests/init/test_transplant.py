"""Warm starts: what is loaded is bitwise the source's, and what is not is said."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxkit import tree
from jaxkit.init.pretrain import contrastive_loss, hide, masked_loss, span_mask, triplet_loss
from jaxkit.init.transplant import crop, resize, transplant

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def encode(params, x):
    h = jnp.tanh(x @ params["inputs"]["kernel"] + params["inputs"]["bias"])
    return jnp.tanh(h @ params["block"]["kernel"])


def encoder(seed, channels):
    return {
        "inputs": {"kernel": normal(seed, channels, 8), "bias": normal(seed + 1, 8)},
        "block": {"kernel": normal(seed + 2, 8, 8)},
    }


# ---------------------------------------------------------------------------------- transplant


def test_self_pretraining_to_the_task():
    source = {"encoder": encoder(0, 4), "decoder": normal(9, 8, 3)}
    target = {"encoder": encoder(50, 3), "head": normal(10, 8, 2)}
    params, report = transplant(source, target, adapt={"**/kernel": crop})
    assert [path for path, _ in report.skipped] == ["head"]
    assert report.unused == ("decoder",)
    assert [path for path, *_ in report.adapted] == ["encoder/inputs/kernel"]
    assert report.adapted[0][2] == "(4, 8) -> (3, 8)"
    loaded, old = tree.flatten(params), tree.flatten(source)
    for path, name in report.loaded:
        assert path == name
        np.testing.assert_array_equal(loaded[path], old[path])
    assert {path for path, _ in report.loaded} == {"encoder/inputs/bias", "encoder/block/kernel"}
    assert params["head"] is target["head"]
    x = normal(3, 5, 7, 3)  # the encoder on x is the pretrained one on [x, mask = 0]
    np.testing.assert_allclose(
        encode(params["encoder"], x),
        encode(source["encoder"], hide(x, jnp.zeros((5, 7), bool))),
        atol=1e-6,
    )


def test_every_leaf_is_in_the_report():
    source = {"a": normal(0, 2, 2), "b": normal(1, 3), "step": jnp.array(4)}
    target = {"a": jnp.zeros((2, 2), jnp.bfloat16), "c": jnp.zeros(3), "step": jnp.array(0)}
    params, report = transplant(source, target)
    named = [p for p, *_ in (*report.loaded, *report.adapted, *report.skipped)]
    assert sorted(named) == ["a", "c", "step"] and report.unused == ("b",)
    assert params["a"].dtype == jnp.bfloat16 and report.adapted[0][2] == "float32 -> bfloat16"
    np.testing.assert_array_equal(params["a"], source["a"].astype(jnp.bfloat16))
    assert params["step"] == 4
    for path in ("a", "b", "c", "step"):
        assert f" {path}" in str(report)
    same, report = transplant(params, params)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert not report.skipped and not report.unused and not report.adapted


def test_rename():
    source = {"vision": {"w": normal(0, 2, 2), "head": normal(1, 2, 5)}, "w": normal(2, 2, 2)}
    target = {"clip": {"image": {"w": jnp.zeros((2, 2)), "head": jnp.zeros((2, 5))}}}
    names = {"vision": "clip/image", "vision/head": None}
    params, report = transplant(source, target, rename=names)
    np.testing.assert_array_equal(params["clip"]["image"]["w"], source["vision"]["w"])
    assert report.unused == ("vision/head", "w")
    assert report.loaded == (("clip/image/w", "vision/w"),)
    by_function = lambda path: path.replace("vision", "clip/image")
    _, report = transplant(source, target, rename=by_function)
    assert len(report.loaded) == 2 and report.unused == ("w",)
    flat = {"w": source["w"]}
    _, report = transplant(flat, {"m": {"w": jnp.zeros((2, 2))}}, rename={"": "m"})
    assert report.loaded == (("m/w", "w"),)
    with pytest.raises(ValueError, match="'vision/w' of the source both become 'w'"):
        transplant(source, {"w": jnp.zeros((2, 2))}, rename={"vision": ""})


def test_positions_of_another_length():
    table = jnp.linspace(0, 1, 8)[:, None] * jnp.ones(3)
    params, report = transplant({"p": table}, {"p": jnp.zeros((16, 3))}, adapt=resize)
    assert report.adapted[0][2] == "(8, 3) -> (16, 3)"
    assert (jnp.diff(params["p"], axis=0) >= 0).all()
    same = resize("p", table, table)
    np.testing.assert_allclose(same, table, atol=1e-7)
    assert crop("p", table, jnp.zeros((16, 3))) is None
    assert resize("p", table, jnp.zeros(16)) is None


def test_it_runs_under_jit_and_on_shapes():
    source, target = {"w": normal(0, 4, 2), "h": normal(1, 2)}, {"w": normal(2, 3, 2)}
    fill = lambda s, t: transplant(s, t, adapt=crop)[0]
    np.testing.assert_array_equal(jax.jit(fill)(source, target)["w"], fill(source, target)["w"])
    abstract = jax.eval_shape(lambda: target)
    np.testing.assert_array_equal(fill(source, abstract)["w"], source["w"][:3])


def test_what_must_be_filled():
    source, target = {"w": normal(0, 2, 2)}, {"w": jnp.zeros((3, 2)), "v": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match=r"'w' .* shape \(2, 2\) in the source, \(3, 2\) in the"):
        transplant(source, target, where="w")
    with pytest.raises(ValueError, match="no leaf of the target could be filled"):
        transplant(source, target)
    with pytest.raises(ValueError, match=r"'v' .* its nearest: 'w'"):
        transplant(source, {"w": source["w"], "v": source["w"]}, where="*")
    kept, report = transplant({"w": source["w"], "v": source["w"]}, target, where="v")
    assert kept["w"] is target["w"] and ("w", "not chosen") in report.skipped
    with pytest.raises(ValueError, match=r"adapted to \(1,\)"):
        transplant(source, target, adapt=lambda path, old, new: jnp.zeros(1))


# ------------------------------------------------------------------------------- pretraining


def test_masked_loss_sees_the_hidden_positions_alone():
    mask = jax.random.bernoulli(KEY, 0.5, (3, 6))
    x, y = normal(0, 3, 6, 2), normal(1, 3, 6, 2)
    loss = masked_loss(x, y, mask)
    np.testing.assert_allclose(loss, np.abs(x - y)[np.asarray(mask)].mean(), rtol=1e-6)
    other = jnp.where(mask[..., None], x, jnp.nan)
    np.testing.assert_array_equal(masked_loss(other, y, mask), loss)
    grad = jax.grad(masked_loss)(other, y, mask)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()
    tokens = jnp.argmax(y, -1)
    want = optax.softmax_cross_entropy_with_integer_labels(x, tokens)[mask].mean()
    np.testing.assert_allclose(masked_loss(x, tokens, mask), want, rtol=1e-6)
    assert (jax.grad(masked_loss)(other, tokens, mask)[~mask] == 0).all()
    assert masked_loss(x, y, jnp.zeros((3, 6), bool)) == 0
    with pytest.raises(ValueError, match="want targets"):
        masked_loss(x, y[:2], mask)


def test_masks():
    assert abs(span_mask(KEY, (100, 1000)).mean() - 0.5) < 0.01
    mask = np.asarray(span_mask(KEY, (300, 20), ratio=0.5, span=4))
    assert (mask.sum(-1) == 8).all()  # n = int(20 * 0.5 / 4) = 2 spans
    for row in mask:  # runs of 4 or 8: whole spans that do not overlap
        runs = np.diff(np.flatnonzero(np.diff(np.r_[0, row, 0])))[::2]
        assert set(runs) <= {4, 8}
    # Each of the 14 * 13 / 2 = 91 arrangements is as likely as any other.
    many = np.asarray(span_mask(jax.random.key(1), (9100, 20), ratio=0.5, span=4))
    _, counts = np.unique(many, axis=0, return_counts=True)
    assert len(counts) == 91 and ((counts - 100) ** 2 / 100).sum() < 140  # chi squared, 90 dof
    with pytest.raises(ValueError, match="span=0"):
        span_mask(KEY, (4,), span=0)
    with pytest.raises(ValueError, match="ratio"):
        span_mask(KEY, (4,), ratio=1.5)
    with pytest.raises(ValueError, match="less than a span of 6"):
        span_mask(KEY, (3, 10), ratio=0.5, span=6)
    assert not span_mask(KEY, (3, 10), ratio=0.0, span=6).any()
    assert span_mask(KEY, (100,), ratio=0.29, span=1).sum() == 29  # 28.999999999999996 in floats
    with pytest.raises(ValueError, match="a mask of shape"):
        hide(jnp.ones((3, 2)), jnp.ones(2, bool))


def test_triplets():
    ref, a = normal(0, 6, 4), normal(1, 6, 4)
    b, t = normal(2, 6, 4), jnp.array([1, -1, 1, 1, -1, -1])
    unit = lambda v: np.asarray(v) / np.linalg.norm(v, axis=-1, keepdims=True)
    d = lambda u, v: 1 - (unit(u) * unit(v)).sum(-1)
    hinge = np.maximum(0, 0.05 - np.asarray(t) * (d(ref, b) - d(ref, a)))
    np.testing.assert_allclose(triplet_loss(ref, a, b, t), hinge.mean(), rtol=1e-5)
    np.testing.assert_allclose(triplet_loss(ref, a, a, t), 0.05, rtol=1e-6)
    np.testing.assert_allclose(triplet_loss(ref, b, a, -t), triplet_loss(ref, a, b, t), rtol=1e-6)
    np.testing.assert_allclose(triplet_loss(3 * ref, a, 7 * b, t), hinge.mean(), rtol=1e-5)
    assert triplet_loss(ref, ref, -ref, jnp.ones(6)) == 0
    with pytest.raises(ValueError, match=r"2 \* c - 1"):
        triplet_loss(ref, a, b, (t + 1) // 2)
    with pytest.raises(ValueError, match="are due"):
        triplet_loss(ref, a, b, t[:2])


def test_contrastive_loss():
    same = jnp.ones((8, 3))
    np.testing.assert_allclose(contrastive_loss(same, same), np.log(8), rtol=1e-5)
    eye = jnp.eye(8)
    np.testing.assert_allclose(
        contrastive_loss(eye, eye, temperature=1.0), np.log(np.e + 7) - 1, rtol=1e-5
    )
    a, b = normal(0, 8, 3), normal(1, 8, 3)
    want = contrastive_loss(a, b)
    np.testing.assert_allclose(contrastive_loss(b, a), want, rtol=1e-5)
    np.testing.assert_allclose(contrastive_loss(5 * a, b), want, rtol=1e-5)
    parts = a.reshape(4, 2, 3), b.reshape(4, 2, 3)
    split = jax.pmap(lambda a, b: contrastive_loss(a, b, axis_name="data"), "data")(*parts)
    np.testing.assert_allclose(split, want, rtol=1e-5)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda a, b: contrastive_loss(a, b, axis_name="data"),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(mapped)(a, b), want, rtol=1e-5)


def test_perceptual_initialization():
    """Stage 1 on triplets whose right choice is the brighter one; stage 2 starts from it."""
    x = jax.random.uniform(KEY, (96, 3, 3))
    level = x[..., 0]
    closer = jnp.abs(level[:, 0] - level[:, 1]) < jnp.abs(level[:, 0] - level[:, 2])
    choice = jnp.where(closer, 1, -1)
    tower = encoder(5, 3)

    def loss(params):
        ref, a, b = (encode(params, x[:, i]) for i in range(3))
        return triplet_loss(ref, a, b, choice, margin=0.2)

    @jax.jit
    def train(params, rate):
        tx = optax.adam(rate)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=300)[0][0]

    trained = train(tower, 0.01)
    cosine = lambda u, v: (
        (u * v).sum(-1) / jnp.linalg.norm(u, axis=-1) / jnp.linalg.norm(v, axis=-1)
    )
    ref, a, b = (encode(trained, x[:, i]) for i in range(3))
    right = jnp.sign(cosine(ref, a) - cosine(ref, b)) == choice
    assert right.mean() > 0.9
    two = {"vision": encoder(60, 3), "text": encoder(70, 3), "temperature": jnp.ones(())}
    start, report = transplant({"vision": trained}, two)
    np.testing.assert_array_equal(encode(start["vision"], x), encode(trained, x))
    assert all(not path.startswith("vision") for path, _ in report.skipped)
    assert start["text"]["block"]["kernel"] is two["text"]["block"]["kernel"]
    # With a rate of zero, stage 1 changes nothing: the baseline.
    jax.tree.map(np.testing.assert_array_equal, train(tower, 0.0), tower)
