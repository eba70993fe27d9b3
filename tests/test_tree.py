"""jaxkit.tree against numpy, and its file format against a written-down table."""

import hashlib
import math
from fractions import Fraction

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxkit import _rank as rank
from jaxkit import tree

KEY = jax.random.key(0)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(3)(x))
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])


def haiku_params():
    net = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    return net.init(jax.random.PRNGKey(0), jnp.ones((1, 2)))


def test_paths_of_every_front_end():
    linen = Linen().init(KEY, jnp.ones((1, 2, 2)))
    assert list(tree.flatten(linen))[:4] == [
        "params/Dense_0/bias",
        "params/Dense_0/kernel",
        "params/LayerNorm_0/bias",
        "params/LayerNorm_0/scale",
    ]
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    assert "dense/kernel" in tree.flatten(state) and "blocks/0/bias" in tree.flatten(state)
    module = eqx.nn.MLP(2, 2, 3, 1, key=KEY)
    assert "layers/0/weight" in tree.flatten(module)
    assert list(tree.flatten(haiku_params()))[:2] == ["mlp/~/linear_0/b", "mlp/~/linear_0/w"]


def test_weights_by_default():
    def weights(params):
        return [p for p, bit in tree.flatten(tree.select(params)).items() if bit]

    linen = Linen().init(KEY, jnp.ones((1, 2, 2)))
    assert weights(linen) == [
        "params/Dense_0/kernel",
        "params/MultiHeadDotProductAttention_0/key/kernel",
        "params/MultiHeadDotProductAttention_0/out/kernel",
        "params/MultiHeadDotProductAttention_0/query/kernel",
        "params/MultiHeadDotProductAttention_0/value/kernel",
    ]
    assert weights(nnx.state(Nnx(nnx.Rngs(0)))) == ["blocks/0/kernel", "dense/kernel"]
    assert weights(haiku_params()) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    embedded = {"Embed_0": {"embedding": jnp.ones((5, 2))}, "wte": {"weight": jnp.ones((5, 2))}}
    patch = {"patch_embedding": {"kernel": jnp.ones((2, 2, 3, 4))}, "steps": jnp.ones((2, 2), int)}
    assert weights({**embedded, **patch}) == ["patch_embedding/kernel"]


def test_equal_spellings_are_an_error():
    with pytest.raises(ValueError, match="'a/b'"):
        tree.flatten({"a/b": 1.0, "a": {"b": 2.0}})


PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "Dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)},
    "steps": jnp.array(3),
}


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("**/kernel", ["Dense_0/kernel", "Dense_1/kernel"]),
        ("Dense_?/bias", ["Dense_0/bias", "Dense_1/bias"]),
        ("*_1/*", ["Dense_1/bias", "Dense_1/kernel"]),
        (("Dense_0/*", "**/bias"), ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias"]),
        (lambda path, leaf: leaf.ndim == 1, ["Dense_0/bias", "Dense_1/bias"]),
        ("**", ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"]),
        (jax.tree.map(lambda x: x.size == 6, PARAMS), ["Dense_0/kernel"]),
    ],
)
def test_where(where, chosen):
    bits = tree.select(PARAMS, where)
    assert [path for path, bit in tree.flatten(bits).items() if bit] == chosen
    doubled = tree.map(lambda path, leaf: 2 * leaf, PARAMS, where=where)
    for path, leaf in tree.flatten(doubled).items():
        before = tree.flatten(PARAMS)[path]
        if path in chosen:
            np.testing.assert_array_equal(leaf, 2 * before)
        else:
            assert leaf is before


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("**/kernal", ValueError, "'Dense_0/kernel'"),
        ("kernel", ValueError, "'Dense_0/kernel'"),
        ("steps", ValueError, "no float arrays"),
        (lambda path, leaf: False, ValueError, "chooses none"),
        ({"Dense_0": True}, ValueError, "'Dense_0"),
        (jax.tree.map(lambda x: 1.0, PARAMS), TypeError, "'Dense_0/bias'"),
        (7, ValueError, "does not fit"),
    ],
)
def test_a_bad_where_says_so(where, error, message):
    with pytest.raises(error, match=message):
        tree.select(PARAMS, where)


def test_check_like_names_the_first_difference():
    with pytest.raises(ValueError, match="'Dense_1/bias' is only in the first"):
        tree.check_like(PARAMS, {**PARAMS, "Dense_1": {"kernel": 1.0}}, "mask")
    with pytest.raises(ValueError, match=r"'steps' has shape \(2,\), and \(\) was due"):
        tree.check_like(PARAMS, {**PARAMS, "steps": jnp.ones(2)}, "mask")


def test_keys_are_a_file_format():
    key = jax.random.key(7)
    got = tree.keys(key, {"a": {"w": 0.0}}, "tag")["a"]["w"]
    word = lambda text, i: int.from_bytes(
        hashlib.sha256(text.encode()).digest()[4 * i :][:4], "big"
    )
    want = jax.random.fold_in(key, np.uint32(word("tag", 0)))
    want = jax.random.fold_in(want, np.uint32(word("a/w", 0)))
    want = jax.random.fold_in(want, np.uint32(word("a/w", 1)))
    assert jnp.array_equal(jax.random.key_data(got), jax.random.key_data(want))
    # written down: a change of JAX or of jaxkit that moves it breaks every stored seed
    assert jax.random.key_data(got).tolist() == KEY_OF_A_W


KEY_OF_A_W = [4078430338, 3673706838]


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 3, jax.random.split(KEY, 2)])
def test_untyped_keys_are_refused(key):
    with pytest.raises(TypeError, match="key"):
        tree.keys(key, {"a": 1.0}, "tag")


def test_ravel_round_trip_keeps_dtypes():
    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "c": jnp.full((3, 1), 2.0), "n": jnp.array(1)}
    vector, unravel = tree.ravel(params)
    assert vector.dtype == jnp.float32
    assert vector.tolist() == [1, 1, 1, 1, 2, 2, 2]
    back = unravel(vector * 3)
    assert back["a"].dtype == jnp.bfloat16 and back["n"] is params["n"]
    np.testing.assert_array_equal(back["c"], 6.0)
    with pytest.raises(ValueError, match="shape"):
        unravel(vector[1:])


# ----------------------------------------------------------------------------------------- ranks


def oracle(leaves, k):
    """Rank by a stable sort: larger first, earlier leaf and lower index first among equals."""
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves]) + 0.0
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[: min(k, flat.size)]] = True
    cuts = np.cumsum([x.size for x in leaves])[:-1]
    return [m.reshape(x.shape) for m, x in zip(np.split(mask, cuts), leaves, strict=True)]


def draws(dtype, levels):
    """Three leaves: many ties, both signs, both zeros, infinities, the smallest numbers."""
    rng = np.random.default_rng(levels)
    leaves = [np.round(rng.normal(size=s) * levels) / levels for s in ((7, 11), (5, 3, 4), (1, 2))]
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38]
    leaves[0].flat[: len(special)] = special
    return [jnp.asarray(x.astype(np.float32)).astype(dtype) for x in leaves]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("levels", [1, 5, 10**6])
def test_topk_equals_a_stable_sort(dtype, levels):
    leaves = draws(dtype, levels)
    n = sum(x.size for x in leaves)
    every = [True] * 3
    topk = jax.jit(lambda leaves, k: tree.topk(leaves, k, where=every))
    for k in [0, 1, 2, 8, 70, 77, 78, 100, n - 1, n, n + 5]:
        for got, want in zip(topk(leaves, k), oracle(leaves, k), strict=True):
            np.testing.assert_array_equal(got, want)
        if 1 <= k <= n:
            ordered = np.sort(np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves]))
            assert tree.kth_largest(leaves, k, where=every) == ordered[n - k]
    ks = [10, 59, 2]
    for got, x, k in zip(topk(leaves, ks), leaves, ks, strict=True):
        np.testing.assert_array_equal(got, oracle([x], k)[0])


def test_topk_of_mixed_dtypes_is_by_value():
    leaves = [jnp.array([[1.5, 1.0]], jnp.bfloat16), jnp.array([[1.25, 1.0]], jnp.float32)]
    got = tree.topk(leaves, 3, where=[True, True])
    assert [x.tolist() for x in got] == [[[True, True]], [[True, False]]]


def test_topk_within_and_beyond():
    leaves = draws(jnp.float32, 5)
    within = [jnp.asarray(np.random.default_rng(0).random(x.shape) < 0.4) for x in leaves]
    size = sum(int(m.sum()) for m in within)
    every = [True] * 3
    for k in [0, 1, size // 2, size - 1, size, size + 1, 1000]:
        got = tree.topk(leaves, k, where=every, within=within)
        inside = [np.where(m, x, -np.inf) for x, m in zip(leaves, within, strict=True)]
        # -inf itself is among the scores, inside and outside: rank the inside alone
        ranked = np.concatenate(
            [x[m] for x, m in zip(map(np.asarray, inside), map(np.asarray, within), strict=True)]
        )
        best = np.zeros(ranked.size, bool)
        best[np.argsort(-ranked, kind="stable")[:k]] = True
        flat = np.concatenate(
            [np.asarray(g)[np.asarray(m)] for g, m in zip(got, within, strict=True)]
        )
        np.testing.assert_array_equal(flat, best)
        assert sum(int(g.sum()) for g in got) == min(k, size)


def test_nan_raises_eagerly_and_ranks_lowest_under_jit():
    leaves = [jnp.array([[jnp.nan, -jnp.inf, 1.0, jnp.nan]])]
    with pytest.raises(ValueError, match="'0' holds NaN"):
        tree.topk(leaves, 1)
    topk = jax.jit(lambda x, k: tree.topk(x, k)[0][0])
    assert topk(leaves, 2).tolist() == [False, True, True, False]
    assert topk(leaves, 3).tolist() == [True, True, True, False]
    with pytest.raises(TypeError, match="complex"):
        tree.topk([jnp.ones((2, 2), complex)], 1)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.7, 0.999, 1.0])
def test_quantile_equals_numpy(q):
    x = np.random.default_rng(1).normal(size=(13, 7)).astype(np.float32)
    # numpy computes the rank in floats: 0.7 * 90 is 62.99999999999999 there, and 63 here
    want = np.sort(x.ravel())[math.floor(Fraction(repr(q)) * (x.size - 1))]
    assert tree.quantile([jnp.asarray(x)], q) == want
    assert tree.quantile([jnp.asarray(x)], np.float64(q)) == want
    if q * 8 == int(q * 8):
        assert want == np.quantile(x, q, method="lower")
        assert jax.jit(tree.quantile)([jnp.asarray(x)], q) == want


def test_float64_ranks_in_64_bits():
    with jax.enable_x64(True):
        x = 1 + np.arange(8.0).reshape(2, 4) * 1e-14
        got = tree.topk([jnp.asarray(x)], 3)[0]
        assert tree.kth_largest([jnp.asarray(x)], 3) == x[1, 1]
    np.testing.assert_array_equal(got, x >= x[1, 1])


@pytest.mark.parametrize("word", [2, 8, 64])
def test_counts_and_positions_of_leaves_beyond_one_word(monkeypatch, word):
    """With a smaller word, small leaves take the path of leaves of more than 2**32 entries."""
    x = jnp.asarray(np.random.default_rng(2).integers(0, 2, (5, 4, 6)).astype(bool))
    monkeypatch.setattr(rank, "_WORD", word)
    pair = rank.count(x)
    assert int(pair.hi) * 2**32 + int(pair.lo) == int(x.sum())
    row, column, _ = rank._positions(x.shape)
    width = int(column.max()) + 1
    np.testing.assert_array_equal((row * width + column).ravel(), np.arange(x.size))
    assert width < word or width == 6
    ones = int(x.sum())
    for quota in [0, 1, ones // 2, ones]:
        limit = rank.Pair(jnp.zeros(1, jnp.uint32), jnp.full(1, quota, jnp.uint32))
        got = rank._first([x], limit)[0]
        want = x.ravel() & (np.cumsum(x.ravel()) <= quota)
        np.testing.assert_array_equal(got.ravel(), want)


def test_two_word_arithmetic():
    values = [0, 1, 2**32 - 1, 2**32, 7 * 2**32 + 5, 2**40]
    value = lambda p: int(p.hi) * 2**32 + int(p.lo)
    for a in values:
        for b in values:
            x, y = rank.as_pair(a), rank.as_pair(b)
            assert bool(rank._at_least(x, y)) == (a >= b)
            assert value(rank._minimum(x, y)) == min(a, b)
            if a >= b:
                assert value(rank.minus(x, y)) == a - b
    stacked = rank.Pair(*(jnp.stack(w) for w in zip(*map(rank.as_pair, values), strict=True)))
    assert value(rank._add_up(stacked)) == sum(values)
    assert value(rank.as_pair(jnp.float32(3 * 2**33))) == 3 * 2**33
    assert value(rank.as_pair(jnp.int32(-3))) == 0


def test_replace_puts_back_what_chosen_took_out():
    params = {"a": {"w": jnp.ones((2, 2)), "n": 3}, "b": [jnp.zeros(2), jnp.arange(2)]}
    for where in (None, "**/w", tree.every(params)):
        taken = tree.chosen(params, where)
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, tree.replace(params, taken), params))
    new = tree.replace(params, {"b/0": "other"})
    assert new["b"][0] == "other" and new["a"]["w"] is params["a"]["w"]
    floats = tree.chosen(params, tree.every(params))
    assert list(floats) == ["a/w", "b/0"] and tree.chosen({"n": 3}, tree.every({"n": 3})) == {}
    loss = lambda p: (p["a"]["w"] ** 2).sum() * p["a"]["n"] + (p["b"][0] * p["b"][1]).sum()
    grads = jax.grad(lambda w: loss(tree.replace(params, w)))(floats)
    np.testing.assert_array_equal(grads["a/w"], np.full((2, 2), 6.0))
    np.testing.assert_array_equal(grads["b/0"], [0, 1])
    with pytest.raises(ValueError, match=r"no leaf 'a/v'; the nearest: 'a/w'"):
        tree.replace(params, {"a/v": 0})


def test_vmap_over_k_equals_a_loop():
    leaves = draws(jnp.float32, 5)
    ks = jnp.array([1, 9, 50])
    batched = jax.vmap(lambda k: tree.topk(leaves, k, where=[True] * 3)[0])(ks)
    for got, k in zip(batched, [1, 9, 50], strict=True):
        np.testing.assert_array_equal(got, oracle(leaves, k)[0])


def test_sharded_topk_moves_counts_and_never_leaves():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(3)
    leaves = [jnp.asarray(np.round(rng.normal(size=(64, 128)) * 4).astype(np.float32))] * 2
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    placed = jax.device_put(leaves, sharding)
    topk = jax.jit(tree.topk)
    for k in [3, 5000]:
        got = topk(placed, k)
        for g, want in zip(got, oracle(leaves, k), strict=True):
            assert g.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_array_equal(g, want)
    program = topk.lower(placed, 3).compile().as_text()
    assert "all-reduce" in program
    for gather in ("all-gather", "all-to-all", "collective-permute"):
        assert gather not in program
