"""Layer tickets: masked blocks are removed blocks, and the least important goes first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxkit import masks, probes, trace
from tests.zoo import convolution
from tests.zoo.model import randomize

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 3))
BLOCKS = {f"block{i}": f"block{i}/**" for i in range(3)}


def features(params, x):
    """A residual network, for as many blocks as there are."""
    x = x @ params["in"]
    for name in sorted(k for k in params if k.startswith("block")):
        p = params[name]
        x = x + jnp.tanh(x @ p["up"] + p["b"]) @ p["down"] + p["c"]
    return x


def net(params, x):
    return features(params, x) @ params["out"]


def draw(seed) -> dict:
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    block = lambda: {"up": normal(4, 6), "b": normal(6), "down": normal(6, 4), "c": normal(4)}
    return {"in": normal(3, 4), "out": normal(4, 2)} | {name: block() for name in BLOCKS}


PARAMS: dict = draw(0)


def test_a_masked_block_is_a_removed_block():
    whole = masks.report(PARAMS, masks.layer_mask(PARAMS, {}, BLOCKS), where=lambda *_: True)
    for name in BLOCKS:
        mask = masks.layer_mask(PARAMS, {name: False}, BLOCKS)
        removed = {k: v for k, v in PARAMS.items() if k != name}
        masked = net(masks.apply(PARAMS, mask), X)
        np.testing.assert_allclose(masked, net(removed, X), atol=1e-6)
        report = masks.report(PARAMS, mask, where=lambda *_: True)
        block = sum(w.size for w in PARAMS[name].values())
        assert whole.all.kept - report.all.kept == block == 4 * 6 + 6 + 6 * 4 + 4
    gone = masks.layer_mask(PARAMS, dict.fromkeys(BLOCKS, False), BLOCKS)
    linear = net({"in": PARAMS["in"], "out": PARAMS["out"]}, X)
    np.testing.assert_allclose(net(masks.apply(PARAMS, gone), X), linear, atol=1e-6)


def test_importance_is_what_removal_changes():
    scores = jax.jit(lambda p: masks.layer_scores(features, p, (X,), BLOCKS))(PARAMS)
    for name in BLOCKS:
        removed = {k: v for k, v in PARAMS.items() if k != name}
        expected = 1 - probes.cka(features(PARAMS, X), features(removed, X))
        assert float(scores[name]) == pytest.approx(float(expected), abs=2e-6)
        assert 1e-3 < scores[name] < 1


def test_a_block_that_adds_nothing_goes_first():
    idle = {**PARAMS["block1"], "down": jnp.zeros((6, 4)), "c": jnp.zeros(4)}
    params = {**PARAMS, "block1": idle}
    scores = masks.layer_scores(features, params, (X,), BLOCKS)
    assert abs(float(scores["block1"])) < 1e-6
    keep = masks.layer_tickets(features, params, (X,), BLOCKS, remove=1)
    assert [bool(bit) for bit in keep.values()] == [True, False, True]


def test_blocks_are_scored_anew_after_each_removal():
    find = lambda n: masks.layer_tickets(features, PARAMS, (X,), BLOCKS, remove=n)
    params, left = PARAMS, dict(BLOCKS)
    for n in range(1, 4):
        scores = masks.layer_scores(features, params, (X,), left)
        least = min(scores, key=lambda name: float(scores[name]))
        del left[least]
        params = {k: v for k, v in params.items() if k != least}
        assert {name for name, bit in find(n).items() if bit} == set(left)


def test_a_ticket_can_be_chosen_by_topk():
    scores = masks.layer_scores(features, PARAMS, (X,), BLOCKS)
    keep = masks.topk(scores, keep=2, where="**")
    one = masks.layer_tickets(features, PARAMS, (X,), BLOCKS, remove=1)
    assert {k: bool(v) for k, v in keep.items()} == {k: bool(v) for k, v in one.items()}


# ------------------------------------------------------------------------ which may be skipped


def test_blocks_of_a_resnet():
    """The block that opens the second stage, with its projection, changes the stream."""
    apply_fn, params, args = convolution.RESNET.build()
    params = randomize(params)
    axes, roles = trace.axes(apply_fn, params, *args), trace.roles(apply_fn, params, *args)
    found = masks.residual_blocks(params, axes, roles)
    assert found == {"block0": "block0/**", "block2": "block2/**"}
    assert masks.residual_blocks(params, axes, roles, found) == found
    three = {f"block{i}": f"block{i}/**" for i in range(3)}
    with pytest.raises(
        ValueError, match=r"\['block1'\] may not be skipped: .*\['block0', 'block2'\]"
    ):
        masks.residual_blocks(params, axes, roles, three)
    # with BatchNorm at the end of the branch: all of its leaves are zero, and relu(x) is x
    mask = masks.layer_mask(params, {"block0": False}, found)
    masked = apply_fn(masks.apply(params, mask), *args)
    skipped = {**params, "block0": jax.tree.map(jnp.zeros_like, params["block0"])}
    skipped["block0"]["conv1"]["norm"]["var"] += 1
    np.testing.assert_allclose(masked, apply_fn(skipped, *args), rtol=1e-5)
    assert jnp.isfinite(masked).all() and float(jnp.std(masked, axis=0).max()) > 0


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for i in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=6, name=f"attention_{i}")(h)
            h = nn.LayerNorm()(x)
            h = nn.Dense(10, name=f"up_{i}")(h)
            x = x + nn.Dense(8, name=f"down_{i}")(nn.gelu(h))
        return nn.Dense(2)(nn.LayerNorm()(x).mean(1))


def test_blocks_of_a_transformer():
    """Attention is found by its path; an mlp of two layers by naming both."""
    x = jax.random.normal(KEY, (2, 5, 3))
    params = Transformer().init(KEY, x)
    axes, roles = (f(Transformer().apply, params, x) for f in (trace.axes, trace.roles))
    found = masks.residual_blocks(params, axes, roles)
    assert list(found) == ["params/attention_0", "params/attention_1"]
    mlp = {"mlp_0": ["params/up_0/*", "params/down_0/*"]}
    assert masks.residual_blocks(params, axes, roles, mlp) == mlp
    with pytest.raises(ValueError, match=r"\['up_0'\] may not be skipped"):
        masks.residual_blocks(params, axes, roles, {"up_0": "params/up_0/*"})


def test_a_network_without_a_stream_has_no_blocks():
    params = {name: {"w": jnp.ones((4, 4))} for name in "abc"}
    mlp = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"]) @ p["c"]["w"]
    x = jnp.ones((2, 4))
    axes, roles = trace.axes(mlp, params, x), trace.roles(mlp, params, x)
    with pytest.raises(ValueError, match="no group of leaves with a common prefix"):
        masks.residual_blocks(params, axes, roles)


def test_a_block_whose_mask_cuts_the_signal_is_important():
    """A scale after the sum belongs to the stream, not to the branch."""

    def post_norm(params, x):
        for name in ("a", "b"):
            p = params[name]
            x = (x + jnp.tanh(x @ p["w"])) * p["scale"]
        return x

    keys = jax.random.split(KEY)
    params = {
        name: {"w": 0.01 * jax.random.normal(k, (3, 3)), "scale": jnp.ones(3)}
        for name, k in zip("ab", keys, strict=True)
    }
    whole = masks.layer_scores(post_norm, params, (X,), {"a": "a/*", "b": "b/w"})
    assert float(whole["a"]) == 1 and whole["b"] < 0.01


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="no block is named 'block9'; the blocks"):
        masks.layer_mask(PARAMS, {"block9": False}, BLOCKS)
    with pytest.raises(ValueError, match="matches no leaf; the nearest paths"):
        masks.layer_mask(PARAMS, {"x": False}, {"x": "blok/**"})
    with pytest.raises(ValueError, match="remove=4, and there are 3 blocks"):
        masks.layer_tickets(features, PARAMS, (X,), BLOCKS, remove=4)
