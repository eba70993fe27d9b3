"""Synaptic flow: closed forms, conservation, the published loop, and no layer collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks


def waves(*shape, a):
    """Numbers that any program can make."""
    return jnp.asarray(np.sin(a * np.arange(1, np.prod(shape) + 1)).astype(np.float32)).reshape(
        shape
    )


def chain(params, x):
    for i in range(len(params) - 1):
        x = jax.nn.relu(x @ params[f"w{i}"])
    return x @ params[f"w{len(params) - 1}"]


SMALL = {"w0": waves(12, 10, a=1.7), "w1": waves(10, 10, a=0.9), "w2": waves(10, 6, a=2.3)}


def test_the_closed_form_of_a_product_of_matrices():
    """(|w| dR/d|w|)_ij of layer l is left_i |W_ij| right_j: the flow in times the flow out."""
    got = masks.synflow(chain, SMALL, jax.ShapeDtypeStruct((1, 12), jnp.float32))
    sizes = [np.abs(np.float64(SMALL[f"w{i}"])) for i in range(3)]
    for i in range(3):
        left, right = np.ones(12), np.ones(6)
        for w in sizes[:i]:
            left = left @ w
        for w in reversed(sizes[i + 1 :]):
            right = w @ right
        want = left[:, None] * sizes[i] * right[None, :]
        np.testing.assert_allclose(got[f"w{i}"], want, rtol=1e-5)


def test_flow_is_conserved_by_every_unit_and_layer_and_data_do_not_matter():
    scores = jax.tree.map(np.float64, masks.synflow(chain, SMALL, jnp.zeros((1, 12))))
    for i in range(2):
        np.testing.assert_allclose(scores[f"w{i}"].sum(0), scores[f"w{i + 1}"].sum(1), rtol=1e-5)
    flow = float(chain(jax.tree.map(jnp.abs, SMALL), jnp.ones((1, 12))).sum())
    for s in scores.values():
        np.testing.assert_allclose(s.sum(), flow, rtol=1e-5)
    signs = jax.tree.map(jnp.negative, SMALL)
    again = masks.synflow(chain, signs, jnp.full((1, 12), jnp.nan))
    jax.tree.map(
        np.testing.assert_array_equal, again, masks.synflow(chain, SMALL, jnp.zeros((1, 12)))
    )


def test_biases_carry_flow_and_state_is_handed_through():
    def apply(params, x, scale, train):
        assert train is False
        return {"logits": (x @ params["kernel"] + params["bias"]) * scale, "extra": x.sum()}

    params = {"kernel": waves(3, 2, a=1.3), "bias": jnp.array([-2.0, 1.0]), "step": jnp.array(3)}
    got = masks.synflow(apply, params, jnp.zeros((1, 3)), 10.0, False)
    np.testing.assert_allclose(got["kernel"], 10 * np.abs(params["kernel"]), rtol=1e-6)
    np.testing.assert_allclose(got["bias"], [20, 10], rtol=1e-6)
    assert got["step"] is params["step"]


# What the authors' loop keeps, written in torch from their pruners.py and prune.py: |grad * w| of
# the absolute network in float64, 100 rounds, int((1 - density) n) entries pruned.
PUBLISHED = {
    0.8: [
        [0, 9, 11, 18, 28, 31, 39, 41, 48, 59, 61, 68, 70, 79, 81, 89, 98, 109, 111, 118],
        [4, 8, 11, 12, 14, 15, 18, 81, 82, 84, 85, 88, 91, 92, 94, 95, 98],
        [8, 9, 11, 12, 13, 15, 16, 24, 26, 27, 28, 30, 31, 34, 35, 49, 50, 52, 53],
    ],
    0.95: [[9, 11, 59, 61, 109], [15, 18, 95, 98], [31, 34, 35, 49, 53]],
}


def loop_of_products(density, count, rounds=100):
    """The loop by the closed form, in float64; `count` rounds the number of pruned entries."""
    sizes = [np.abs(np.float64(SMALL[f"w{i}"])) for i in range(3)]
    live = np.ones(280, bool)
    for r in range(1, rounds + 1):
        parts = np.split(live, [120, 220])
        q = [w * m.reshape(w.shape) for w, m in zip(sizes, parts, strict=True)]
        left = [np.ones(12), np.ones(12) @ q[0], np.ones(12) @ q[0] @ q[1]]
        right = [q[1] @ q[2] @ np.ones(6), q[2] @ np.ones(6), np.ones(6)]
        flow = [a[:, None] * w * b for a, w, b in zip(left, q, right, strict=True)]
        scores = np.where(live, np.concatenate([f.ravel() for f in flow]), -1)
        pruned = count((1 - density ** (r / rounds)) * 280)
        first = np.argsort(-scores, kind="stable")[: 280 - pruned]
        live &= np.isin(np.arange(280), first)
    return [np.flatnonzero(m).tolist() for m in np.split(live, [120, 220])]


def test_the_mask_of_the_published_loop():
    """But for the rounding of the counts in between, on which the way to 0.8 depends."""
    x = jnp.ones((1, 12))
    traced = jax.jit(lambda s: masks.synflow_mask(chain, SMALL, x, sparsity=s))
    for sparsity, published in PUBLISHED.items():
        assert loop_of_products(1 - sparsity, int) == published
        got = masks.synflow_mask(chain, SMALL, x, sparsity=sparsity)
        want = loop_of_products(1 - sparsity, round)
        assert [np.flatnonzero(m).tolist() for m in got.values()] == want
        jax.tree.map(np.testing.assert_array_equal, traced(sparsity), got)
    assert want == published


def tree_of(key, widths):
    """A net with layers of very different sizes, He-initialized."""
    keys = jax.random.split(key, len(widths) - 1)
    shapes = zip(keys, widths[:-1], widths[1:], strict=True)
    return {
        f"w{i}": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5 for i, (k, a, b) in enumerate(shapes)
    }


def test_no_layer_collapses_where_one_shot_scores_cut_the_network():
    """A path is left down to four weights, where the others leave none of twenty."""
    params = tree_of(jax.random.key(0), (16, 96, 96, 96, 8))
    x = jax.random.normal(jax.random.key(1), (32, 16))
    labels = jnp.argmax(x[:, :8], 1)
    n = sum(w.size for w in params.values())
    loss = masks.tempered(chain, 1.0)
    one_shot = {
        "magnitude": masks.magnitude(params),
        "snip": masks.snip(loss, params, (x, labels)),
        "synflow": masks.synflow(chain, params, jnp.ones((1, 16))),
    }
    in_rounds = jax.jit(lambda s: masks.synflow_mask(chain, params, jnp.ones((1, 16)), sparsity=s))

    def alive(mask):
        flow = chain(masks.apply(jax.tree.map(jnp.abs, params), mask), jnp.ones((1, 16)))
        return bool((flow > 0).any()), min(int(m.sum()) for m in mask.values())

    for keep in (100, 20, 4):
        sparsity = 1 - keep / n
        mask = in_rounds(sparsity)
        assert sum(int(m.sum()) for m in mask.values()) == keep
        connected, thinnest = alive(mask)
        assert connected and thinnest >= 1, keep
    # maximal critical compression: four weights are one path
    np.testing.assert_array_equal([int(m.sum()) for m in mask.values()], [1, 1, 1, 1])
    for name, scores in one_shot.items():
        connected, thinnest = alive(masks.topk(scores, keep=20))
        assert not connected, name
        assert (thinnest == 0) == (name != "snip")  # which leaves all layers some, but no path


def test_rounds_nest_fall_by_equal_shares_and_end_exactly():
    counts = []

    def score(params):
        live = sum(jnp.sum(w != 0) for w in params.values())
        jax.debug.callback(lambda n: counts.append(int(n)), live, ordered=True)
        return masks.magnitude(params)

    params = {"w0": waves(50, 40, a=0.37), "bias": jnp.zeros(3)}
    mask = masks.prune_in_rounds(score, params, 0.99, rounds=10)
    jax.effects_barrier()
    density = 0.01 ** (np.arange(10) / 10)
    np.testing.assert_array_equal(counts, np.rint(2000 * density))
    assert int(mask["w0"].sum()) == 20 and mask["bias"].all()
    want = masks.topk(masks.magnitude(params), sparsity=0.99)  # the score does not change
    np.testing.assert_array_equal(mask["w0"], want["w0"])
    # nested even where the scores turn over
    flipped = masks.prune_in_rounds(
        lambda p: jax.tree.map(lambda w: jnp.where(w == 0, 9.0, -jnp.abs(w)), p), params, 0.5
    )
    assert int(flipped["w0"].sum()) == 1000
    one = masks.prune_in_rounds(masks.magnitude, params, 0.5, rounds=1)
    np.testing.assert_array_equal(
        one["w0"], masks.topk(masks.magnitude(params), sparsity=0.5)["w0"]
    )
    none = masks.prune_in_rounds(masks.magnitude, params, 0.0)
    assert none["w0"].all()


def test_bad_input():
    x = jnp.ones((1, 12))
    with pytest.raises(TypeError, match="float inputs are due, and inputs/tokens is int32"):
        masks.synflow(chain, SMALL, {"tokens": jnp.zeros((1, 12), jnp.int32)})
    with pytest.raises(ValueError, match="'w0' are not finite: the flow through the network"):
        masks.synflow(chain, jax.tree.map(lambda w: w * 1e15, SMALL), x)
    with pytest.raises(ValueError, match="round 1 are not finite"):
        masks.synflow_mask(chain, jax.tree.map(lambda w: w * 1e15, SMALL), x, sparsity=0.5)
    with pytest.raises(ValueError, match=r"1\.0, and a number in \[0, 1\) is due"):
        masks.synflow_mask(chain, SMALL, x, sparsity=1.0)
    with pytest.raises(ValueError, match="rounds is 0"):
        masks.synflow_mask(chain, SMALL, x, sparsity=0.5, rounds=0)
