"""Selection by chance, by a threshold, in blocks and n of m."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from jaxkit import masks, tree

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


PARAMS = {"conv": normal(3, 3, 4, 8), "dense": normal(16, 12, seed=1), "bias": normal(8, seed=2)}


# --------------------------------------------------------------------------------------- bernoulli


def test_bernoulli_counts_are_binomial_and_independent():
    params = {"w0": jnp.zeros((100, 50)), "w1": jnp.zeros((40, 50))}
    draw = lambda key, s: jax.tree.map(jnp.sum, masks.bernoulli(key, params, s))
    keys = jax.random.split(KEY, 500)
    counts = jax.jit(jax.vmap(draw, (0, None)))(keys, {"w0": 0.9, "w1": 0.3})
    for name, n, s in (("w0", 5000, 0.9), ("w1", 2000, 0.3)):
        z = (np.asarray(counts[name]) - n * (1 - s)) / np.sqrt(n * s * (1 - s))
        assert abs(z.mean()) < 4 / np.sqrt(500)
        assert abs(z.var() - 1) < 4 * np.sqrt(2 / 500)
    a, b = (np.asarray(counts[name], float) for name in ("w0", "w1"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(500)


def test_bernoulli_leaves():
    mask = masks.bernoulli(KEY, PARAMS, 0.5)
    assert mask["bias"].all() and 60 < int(mask["conv"].sum()) < 230
    alone = masks.bernoulli(KEY, {"conv": PARAMS["conv"]}, 0.5)
    np.testing.assert_array_equal(alone["conv"], mask["conv"])
    per_leaf = masks.bernoulli(KEY, PARAMS, {"conv": 0.0, "dense": 0.5, "bias": 0.99})
    assert per_leaf["conv"].all() and int(per_leaf["bias"].sum()) < 8
    np.testing.assert_array_equal(per_leaf["dense"], mask["dense"])
    with pytest.raises(ValueError, match=r"1\.5, and a number in \[0, 1\)"):
        masks.bernoulli(KEY, PARAMS, 1.5)
    with pytest.raises(ValueError, match="'bias' is only in the first"):
        masks.bernoulli(KEY, PARAMS, {"conv": 0.5, "dense": 0.5})
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.bernoulli(jax.random.PRNGKey(0), PARAMS, 0.5)


# --------------------------------------------------------------------------------------- threshold


def test_threshold_keeps_what_reaches_it():
    scores = {"w": jnp.array([[0.0, 0.5, 0.5, jnp.nan, 2.0]]), "bias": jnp.zeros(2)}
    mask = masks.threshold(scores, 0.5)
    assert mask["w"].tolist() == [[False, True, True, False, True]] and mask["bias"].all()
    per_leaf = masks.threshold(scores, {"w": 1.0, "bias": 0.1})
    assert int(per_leaf["w"].sum()) == 1 and not per_leaf["bias"].any()
    scores = masks.magnitude(PARAMS)
    cut = tree.quantile(scores, 0.75)
    got, exact = masks.threshold(scores, cut), masks.topk(scores, keep=121)
    jax.tree.map(np.testing.assert_array_equal, got, exact)  # n - floor(3/4 (n - 1)) of 480


# ------------------------------------------------------------------------------------------ sample


def test_sample_counts_exactly_and_only_what_is_positive():
    scores = masks.magnitude(masks.apply(PARAMS, masks.topk(masks.magnitude(PARAMS), keep=100)))
    mask = masks.sample(KEY, scores, keep=60)
    live = jax.tree.map(lambda s: s > 0, scores)
    assert sum(int(mask[k].sum()) for k in ("conv", "dense")) == 60 and mask["bias"].all()
    assert all(bool((~mask[k] | live[k]).all()) for k in ("conv", "dense"))
    everything = masks.sample(KEY, scores, keep=100)
    np.testing.assert_array_equal(everything["conv"], live["conv"])
    inside = masks.sample(KEY, masks.magnitude(PARAMS), keep=30, within=live)
    assert all(bool((~inside[k] | live[k]).all()) for k in ("conv", "dense"))
    cold = masks.sample(KEY, masks.magnitude(PARAMS), keep=100, temperature=0.0)
    np.testing.assert_array_equal(cold["conv"], live["conv"])


def test_sample_refuses_what_cannot_be_drawn():
    scores = {"w0": jnp.array([[1.0, 0.0, 0.0]]), "w1": jnp.array([[1.0, 2.0, 3.0]])}
    with pytest.raises(
        ValueError, match=r"5 entries of all chosen leaves .* 4 scores are positive"
    ):
        masks.sample(KEY, scores, keep=5)
    with pytest.raises(ValueError, match=r"2 entries of 'w0' .* 1 scores are positive"):
        masks.sample(KEY, scores, keep={"w0": 2, "w1": 1})
    assert int(masks.sample(KEY, scores, sparsity={"w0": 2 / 3, "w1": 0.0})["w0"].sum()) == 1
    with pytest.raises(ValueError, match="'w1' holds negative scores"):
        masks.sample(KEY, {**scores, "w1": -scores["w1"]}, keep=2)
    jitted = jax.jit(lambda s: masks.sample(KEY, s, keep=5))(scores)
    assert sum(int(m.sum()) for m in jitted.values()) == 5


# ------------------------------------------------------------------------------------------ blocks


def pooled(x, b):
    """Sums over b neighbours along the outputs, by a plain loop."""
    flat = np.abs(np.asarray(x)).reshape(-1, x.shape[-1])
    return np.array([[row[i : i + b].sum() for i in range(0, x.shape[-1], b)] for row in flat])


@pytest.mark.parametrize("b", [1, 2, 4])
def test_blocks_of_outputs_are_whole_and_the_best(b):
    scores = masks.magnitude(PARAMS)
    mask = masks.blocks(scores, {-1: b}, sparsity=0.8)
    n = (288 + 192) // b
    sums = np.concatenate([pooled(PARAMS[k], b).ravel() for k in ("conv", "dense")])
    cut = np.sort(sums)[::-1][round(0.2 * n) - 1]
    for name in ("conv", "dense"):
        groups = np.asarray(mask[name]).reshape(-1, b)
        assert (groups.all(1) == groups.any(1)).all()
        np.testing.assert_array_equal(groups[:, 0], pooled(PARAMS[name], b).ravel() >= cut)
    assert sum(int(mask[k].sum()) for k in ("conv", "dense")) == b * round(0.2 * n)
    assert mask["bias"].all()
    if b == 1:
        jax.tree.map(np.testing.assert_array_equal, mask, masks.topk(scores, sparsity=0.8))


def test_tiles_and_sparsities_per_leaf():
    scores = masks.magnitude(PARAMS)
    mask = masks.blocks({"dense": scores["dense"]}, {0: 4, 1: 3}, sparsity={"dense": 0.75})["dense"]
    tiles = np.asarray(mask).reshape(4, 4, 4, 3).transpose(0, 2, 1, 3).reshape(16, 12)
    assert (tiles.all(1) == tiles.any(1)).all() and tiles.all(1).sum() == 4
    jitted = jax.jit(lambda s: masks.blocks(scores, {-1: 4}, sparsity=s))(0.5)
    eager = masks.blocks(scores, {-1: 4}, sparsity=0.5)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


def test_pointwise_convolutions_in_blocks_and_their_sparse_product():
    """Depthwise and full kernels stay whole; the masked 1x1 convolution is a sparse matmul."""
    params = {
        "stem": normal(3, 3, 3, 8),
        "depthwise": normal(3, 3, 1, 8),
        "pw": normal(1, 1, 8, 16),
    }
    mask = masks.blocks(masks.magnitude(params), {-1: 4}, sparsity=0.75, where=masks.pointwise)
    assert mask["stem"].all() and mask["depthwise"].all() and int(mask["pw"].sum()) == 32
    kernel = masks.apply(params, mask)["pw"]
    x = normal(2, 5, 5, 8, seed=3)
    dense = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    matrix = sparse.BCOO.fromdense(kernel[0, 0], nse=32)
    product = (matrix.T @ x.reshape(-1, 8).T).T.reshape(dense.shape)
    np.testing.assert_allclose(product, dense, rtol=1e-5, atol=1e-5)


def test_blocks_that_do_not_fit():
    scores = masks.magnitude(PARAMS)
    with pytest.raises(ValueError, match=r"'conv': blocks of 3 do not divide .* \(3, 3, 4, 8\)"):
        masks.blocks(scores, {-1: 3}, sparsity=0.5)
    with pytest.raises(ValueError, match=r"'dense' of shape \(16, 12\) has no dimension 2"):
        masks.blocks(scores, {2: 2}, sparsity=0.5)
    with pytest.raises(ValueError, match="blocks of 0 do not divide"):
        masks.blocks(scores, {0: 0}, sparsity=0.5)
    with pytest.raises(ValueError, match="either sparsity"):
        masks.blocks(scores, {-1: 2})


# ------------------------------------------------------------------------------------------ n of m


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, -2), (1, 2, 0), (3, 4, -1), (0, 4, -2)])
def test_n_of_m_is_the_best_pattern_of_every_group(n, m, axis):
    """Against all patterns of n in m, one group at a time."""
    w = PARAMS["dense"]
    mask = masks.n_of_m(masks.magnitude({"w": w}), n, m, axis=axis)["w"]
    groups = np.moveaxis(np.abs(np.asarray(w)), axis, -1).reshape(-1, m)
    bits = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
    assert (bits.sum(1) == n).all()
    patterns = np.array([[i in c for i in range(m)] for c in itertools.combinations(range(m), n)])
    best = (groups @ patterns.T).max(1)
    np.testing.assert_allclose((groups * bits).sum(1), best, rtol=1e-6)


def test_n_of_m_ties_traced_n_and_bad_input():
    scores = {"w": jnp.array([[1.0], [1.0], [jnp.nan], [1.0], [0.0], [-0.0], [0.0], [-1.0]])}
    got = masks.n_of_m(scores, 2, 4)["w"].ravel()
    assert got.astype(int).tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    sweep = jax.vmap(lambda n: masks.n_of_m(masks.magnitude(PARAMS), n, 4)["dense"].sum())
    assert sweep(jnp.arange(5)).tolist() == [0, 48, 96, 144, 192]
    with pytest.raises(ValueError, match=r"'dense': blocks of 5 do not divide dimension -2"):
        masks.n_of_m({"dense": scores["w"]}, 2, 5)
    with pytest.raises(ValueError, match="n=5 of m=4"):
        masks.n_of_m(scores, 5, 4)
