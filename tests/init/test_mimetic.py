"""Mimetic initialization of attention: exact products and layouts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxkit import tree
from jaxkit.init.mimetic import factor_pair, mimetic_attention, sincos_2d

KEY = jax.random.key(0)


def plain(d=64, heads=4, dtype=jnp.float32, blocks=("block_0",)):
    """A tree like that of flax attention."""
    shape = (d, heads, d // heads)
    one = lambda: {
        "query": {"kernel": jnp.ones(shape, dtype), "bias": jnp.ones(shape[1:], dtype)},
        "key": {"kernel": jnp.ones(shape, dtype)},
        "value": {"kernel": jnp.ones(shape, dtype)},
        "out": {"kernel": jnp.ones((*shape[1:], d), dtype)},
    }
    return {block: {"attention": one(), "mlp": {"kernel": jnp.ones((d, d))}} for block in blocks}


def products(module, d):
    """Return W_Q W_K^T per head, and W_V W_O."""
    q, k, v, o = (
        np.asarray(module[n]["kernel"], np.float64) for n in ("query", "key", "value", "out")
    )
    return np.einsum("dhk,ehk->hde", q, k), v.reshape(d, -1) @ o.reshape(-1, d)


# --------------------------------------------------------------------------------- factor_pair


def test_factor_pair_is_the_best_approximation():
    a = jax.random.normal(KEY, (3, 12, 9))
    left, right = factor_pair(a)
    np.testing.assert_allclose(left @ right, a, atol=1e-5)
    np.testing.assert_allclose(  # balanced: both Gram matrices are the singular values
        jnp.swapaxes(left, 1, 2) @ left, right @ jnp.swapaxes(right, 1, 2), atol=1e-5
    )
    left, right = factor_pair(a, 4)
    assert left.shape == (3, 12, 4) and right.shape == (3, 4, 9)
    s = np.linalg.svd(np.asarray(a), compute_uv=False)
    error = ((np.asarray(left @ right) - np.asarray(a)) ** 2).sum((1, 2))
    np.testing.assert_allclose(error, (s[:, 4:] ** 2).sum(1), rtol=1e-4)
    for rank in (0, 10):
        with pytest.raises(ValueError, match="rank"):
            factor_pair(a, rank)


# ----------------------------------------------------------------------------------- attention


def test_products_are_near_the_identity():
    d, heads = 64, 4
    params = plain(d, heads)
    new = jax.jit(mimetic_attention())(KEY, params)["block_0"]
    qk, vo = products(new["attention"], d)
    assert abs(np.trace(vo) / d + 0.4) < 0.4 * 3 / d  # the noise's trace has deviation 0.4
    noise = (vo + 0.4 * np.eye(d)) / 0.4 * math.sqrt(d)
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * d * d) and abs(noise.mean()) < 4 / d
    assert (np.trace(qk, axis1=1, axis2=2) > 0).all()
    assert (np.linalg.matrix_rank(qk, tol=1e-4) == d // heads).all()
    assert np.abs(qk[0] - qk[1]).max() > 0.1  # heads are independent
    np.testing.assert_array_equal(new["mlp"]["kernel"], 1)
    np.testing.assert_array_equal(new["attention"]["query"]["bias"], 1)


def test_products_without_noise_are_exact():
    d = 64
    new = mimetic_attention(qk=(0.0, 0.7), vo=(0.0, 0.4))(KEY, plain(d, 4))["block_0"]["attention"]
    qk, vo = products(new, d)
    np.testing.assert_allclose(vo, -0.4 * np.eye(d), atol=1e-6)
    # a projection times 0.7: the best approximations of rank 16 of the identity
    np.testing.assert_allclose(qk @ qk, 0.7 * qk, atol=1e-6)
    np.testing.assert_allclose(np.trace(qk, axis1=1, axis2=2), 0.7 * 16, rtol=1e-5)


def test_one_head_loses_nothing():
    """With k = d the truncation is exact, so that the noise can be read off both products."""
    d = 48
    new = mimetic_attention()(KEY, plain(d, 1))["block_0"]["attention"]
    qk, vo = products(new, d)
    a, b = (qk[0] - 0.7 * np.eye(d)) / 0.7, (vo + 0.4 * np.eye(d)) / 0.4
    for noise in (a, b):
        assert abs(noise.std() * math.sqrt(d) - 1) < 4 / math.sqrt(2 * d * d)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / d
    # the other order of the factors has the same spectrum, and is another matrix
    v, o = (np.asarray(new[n]["kernel"], np.float64).reshape(d, d) for n in ("value", "out"))
    sort = lambda m: np.sort_complex(np.round(np.linalg.eigvals(m), 4))
    np.testing.assert_allclose(np.poly(o @ v)[:4], np.poly(v @ o)[:4], rtol=1e-6)
    assert len(sort(o @ v)) == d and np.abs(o @ v - vo).max() > 0.2


def test_layouts_hold_the_same_kernels():
    d, h, k = 12, 3, 4
    reference = mimetic_attention()(
        KEY,
        {"query": {"kernel": jnp.ones((d, h, k))}}
        | {
            "key": {"kernel": jnp.ones((d, h, k))},
            "value": {"kernel": jnp.ones((d, h, k))},
            "out": {"kernel": jnp.ones((h, k, d))},
        },
    )
    q, v, o = (reference[n]["kernel"] for n in ("query", "value", "out"))

    wide = {n: {"kernel": jnp.ones((d, d))} for n in ("query", "key", "value", "out")}
    new = mimetic_attention(layout="d(hk)", out_layout="(hk)d", heads=h)(KEY, wide)
    np.testing.assert_array_equal(new["query"]["kernel"], q.reshape(d, d))
    np.testing.assert_array_equal(new["out"]["kernel"], o.reshape(d, d))
    torch = mimetic_attention(layout="(hk)d", out_layout="d(hk)", heads=h)(KEY, wide)
    np.testing.assert_array_equal(torch["value"]["kernel"].T, v.reshape(d, d))

    for layout, shape in (("d(3hk)", (d, 3 * d)), ("d3hk", (d, 3, h, k)), ("d(h3k)", (d, 3 * d))):
        params = {"qkv": jnp.ones(shape), "out": jnp.ones((h, k, d))}
        init = mimetic_attention(fused="qkv", out="out", layout=layout, heads=h)
        fused = np.asarray(init(KEY, params)["qkv"])
        order = "dh3k" if layout == "d(h3k)" else "d3hk"
        fused = fused.reshape([{"d": d, "3": 3, "h": h, "k": k}[letter] for letter in order])
        fused = np.moveaxis(fused, order.index("3"), 0)
        np.testing.assert_allclose(
            np.einsum("dhk,ehk->hde", fused[0], fused[1]),
            np.einsum("dhk,ehk->hde", *(np.asarray(x) for x in _redraw(init, d, h, k)[:2])),
            atol=1e-6,
        )


def _redraw(init, d, h, k):
    """The kernels of the same path in the plain fused layout."""
    plain = mimetic_attention(fused="qkv", out="out", layout="3dhk")
    new = plain(KEY, {"qkv": jnp.ones((3, d, h, k)), "out": jnp.ones((h, k, d))})
    return new["qkv"]


def test_stacked_layers_are_drawn_on_their_own():
    shapes = {
        "query": (2, 8, 2, 4),
        "key": (2, 8, 2, 4),
        "value": (2, 8, 2, 4),
        "out": (2, 2, 4, 8),
    }
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    new = mimetic_attention(layout="ldhk", out_layout="lhkd", vo=(0.0, 0.4))(KEY, params)
    for i in range(2):
        product = new["value"]["kernel"][i].reshape(8, 8) @ new["out"]["kernel"][i].reshape(8, 8)
        np.testing.assert_allclose(product, -0.4 * jnp.eye(8), atol=1e-6)
    assert bool((new["query"]["kernel"][0] != new["query"]["kernel"][1]).any())


def test_frontends_and_draws_by_path():
    attention = linen.MultiHeadDotProductAttention(num_heads=2)
    params = attention.init(KEY, jnp.ones((1, 3, 8)))["params"]
    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    for leaves in (params, state):
        new = mimetic_attention(vo=(0.0, 0.4))(KEY, leaves)
        assert jax.tree.structure(new) == jax.tree.structure(leaves)
        flat = tree.flatten(new)
        product = flat["value/kernel"].reshape(8, 8) @ flat["out/kernel"].reshape(8, 8)
        np.testing.assert_allclose(product, -0.4 * jnp.eye(8), atol=1e-6)
    init = jax.jit(mimetic_attention())
    one, two = plain(8, 2), plain(8, 2, blocks=("block_0", "block_1"))
    first, both = init(KEY, one), init(KEY, two)
    np.testing.assert_array_equal(
        first["block_0"]["attention"]["key"]["kernel"],
        both["block_0"]["attention"]["key"]["kernel"],
    )
    a, b = (both[f"block_{i}"]["attention"]["query"]["kernel"] for i in (0, 1))
    assert bool((a != b).any())
    half = mimetic_attention()(KEY, plain(8, 2, jnp.bfloat16))["block_0"]["attention"]
    assert half["query"]["kernel"].dtype == jnp.bfloat16


def test_attention_bad_input():
    params = plain(8, 2)
    attention = params["block_0"]["attention"]
    with pytest.raises(ValueError, match=r"query/kernel.*dimensions"):
        mimetic_attention(layout="d(hk)", heads=2)(KEY, params)
    grouped = {**attention, "key": {"kernel": jnp.ones((8, 1, 4))}}
    with pytest.raises(ValueError, match="'key/kernel'"):
        mimetic_attention()(KEY, grouped)
    narrow = {n: {"kernel": jnp.ones((8, 2, 3))} for n in ("query", "key", "value")}
    with pytest.raises(ValueError, match="2 heads of 3"):
        mimetic_attention()(KEY, {**narrow, "out": {"kernel": jnp.ones((2, 3, 8))}})
    with pytest.raises(ValueError, match="a 3 is due"):
        mimetic_attention(fused="qkv")
    with pytest.raises(ValueError, match="give heads"):
        mimetic_attention(fused="qkv", out="out", layout="d(3hk)")(
            KEY, {"qkv": jnp.ones((8, 24)), "out": jnp.ones((2, 4, 8))}
        )
    lone = {"a": {"query": {"kernel": jnp.ones((8, 2, 4))}}, "b": attention}
    with pytest.raises(ValueError, match="kernels"):
        mimetic_attention()(KEY, lone)
    with pytest.raises(ValueError, match="matches no leaf"):
        mimetic_attention()(KEY, {"w": jnp.ones((2, 2))})


def test_sincos_2d():
    table = np.asarray(sincos_2d(3, 5, 16))
    assert table.shape == (15, 16)
    y, x, i = 2, 3, 2
    frequency = 10_000 ** (-i / 3)
    row = table[y * 5 + x].reshape(4, 4)[:, i]
    expected = [f(g * frequency) for g in (x, y) for f in (math.sin, math.cos)]
    np.testing.assert_allclose(row, expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(2, 2, 6)


@pytest.mark.slow
def test_a_small_vision_transformer_learns_no_worse():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = jnp.asarray(digits.images / 16, jnp.float32).reshape(-1, 4, 2, 4, 2)
    x = x.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    y = jnp.asarray(digits.target)
    d, heads = 32, 4
    optax = pytest.importorskip("optax")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.MultiHeadDotProductAttention(heads)(linen.LayerNorm()(x))
            return x + linen.Dense(d)(jax.nn.gelu(linen.Dense(2 * d)(linen.LayerNorm()(x))))

    class Vit(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(d)(x) + sincos_2d(4, 4, d)
            for _ in range(2):
                x = Block()(x)
            return linen.Dense(10)(linen.LayerNorm()(x).mean(1))

    model, tx = Vit(), optax.adam(1e-3)
    seeds = jax.random.split(KEY, 3)
    start = jax.vmap(lambda key: model.init(key, x[:1]))(seeds)

    @jax.jit
    @jax.vmap
    def accuracy(key, params):
        def loss(params, i):
            logits = model.apply(params, x[i])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[i]).mean()

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.randint(key, (32,), 0, 1300))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        steps = jax.random.split(key, 5 * 1300 // 32)
        params = jax.lax.scan(step, (params, tx.init(params)), steps)[0][0]
        return (model.apply(params, x[1300:]).argmax(-1) == y[1300:]).mean()

    default = float(accuracy(seeds, start).mean())
    mimetic = float(accuracy(seeds, jax.vmap(mimetic_attention())(seeds, start)).mean())
    print(f"default {default:.4f} mimetic {mimetic:.4f}")
    assert mimetic >= default
