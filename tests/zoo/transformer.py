"""Transformers in plain functions.

What the counts below have in common. Tokens, positions and classes are fixed by the inputs and
the outputs. The residual stream d is one axis through all blocks: embeddings, gains, rows of what
reads it and columns of what writes it; LayerNorm and RMSNorm take a mean over it: free, not
removable. Heads are computed apart and summed by the output kernel: removable. The size k of
queries and keys is contracted between them, the size v of values passes to the output kernel: two
axes, each one permutation for all heads, each removable (the logits' scale is a constant). The
hidden layer m is removable. A bias of the keys adds the same to all logits of a query, which
softmax takes away: a leaf that does nothing, so there is none.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo.layers import attend, conv, dense, dense_shapes, layer_norm, norm_shapes, rms_norm
from tests.zoo.model import Model, batch, blocks, draw, ids, merged, whole

VOCAB, CONTEXT = 6, 8


def _heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def _attention(p, x, heads, causal=True):
    q, k, v = (_heads(x @ p[name]["kernel"] + p[name].get("bias", 0.0), heads) for name in "qkv")
    return dense(p["o"], attend(q, k, v, causal=causal).reshape(*x.shape[:-1], -1))


def _attention_shapes(d, h, k, v):
    return {
        "q": dense_shapes(d, h * k),
        "k": {"kernel": (d, h * k)},
        "v": dense_shapes(d, h * v),
        "o": dense_shapes(h * v, d),
    }


def _mlp(p, x):
    return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))


def _block(p, x, heads, causal=True):
    x = x + _attention(p["attention"], layer_norm(p["norm0"], x), heads, causal)
    return x + _mlp(p["mlp"], layer_norm(p["norm1"], x))


def _block_shapes(d, h, k, v, m):
    return {
        "norm0": norm_shapes(d),
        "attention": _attention_shapes(d, h, k, v),
        "norm1": norm_shapes(d),
        "mlp": {"up": dense_shapes(d, m), "down": dense_shapes(m, d)},
    }


def _embed(params, tokens):
    return params["tokens"][tokens] + params["positions"][: tokens.shape[1]]


def _embed_shapes(d):
    return {"tokens": (VOCAB, d), "positions": (CONTEXT, d)}


def _stacked(layers, shapes):
    """The same shapes with a leading dimension."""
    return jax.tree.map(lambda s: (layers, *s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def _vit(d=11, h=3, k=5, v=7, m=13):
    def apply_fn(params, x):
        x = conv(params["patch"]["kernel"], x, 2, "VALID") + params["patch"]["bias"]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(params["class"], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + params["positions"]
        x = _block(params["block"], x, h, causal=False)
        return dense(params["head"], layer_norm(params["norm"], x)[:, 0])

    shapes = {
        "patch": {"kernel": (2, 2, 2, d), "bias": (d,)},
        "class": (1, 1, d),
        "positions": (1, 10, d),
        "block": _block_shapes(d, h, k, v, m),
        "norm": norm_shapes(d),
        "head": dense_shapes(d, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 6, 6, 2),)


# d, heads, k, v, m as said above. The dimensions of 15 and 21 are heads x k and heads x v; the 10
# positions are the class token and 9 patches: fixed.
HEADS = {
    "d": whole(11),
    "h": merged((3, 5), 0) | merged((3, 7), 0),
    "k": merged((3, 5), 1),
    "v": merged((3, 7), 1),
    "m": whole(13),
}
VIT = Model("vit", _vit, (3, 5, 7, 11, 13), (3, 5, 7, 13), HEADS)


def _gpt(d=17, h0=2, k0=5, v0=7, m0=19, h1=3, k1=11, v1=13, m1=23):
    def apply_fn(params, tokens):
        x = _embed(params["embed"], tokens)
        x = _block(params["block0"], x, h0)
        x = _block(params["block1"], x, h1)
        return layer_norm(params["norm"], x) @ params["head"]

    shapes = {
        "embed": _embed_shapes(d),
        "block0": _block_shapes(d, h0, k0, v0, m0),
        "block1": _block_shapes(d, h1, k1, v1, m1),
        "norm": norm_shapes(d),
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 7),)


# d is shared by the two blocks; heads, k, v and m are each block's own: 1 + 2 * 4 axes.
GPT = Model(
    "gpt",
    _gpt,
    (2, 3, 5, 7, 11, 13, 17, 19, 23),
    (2, 3, 5, 7, 11, 13, 19, 23),
    {
        "d": whole(17),
        "h0": merged((2, 5), 0) | merged((2, 7), 0),
        "k0": merged((2, 5), 1),
        "v0": merged((2, 7), 1),
        "m0": whole(19),
        "h1": merged((3, 11), 0) | merged((3, 13), 0),
        "k1": merged((3, 11), 1),
        "v1": merged((3, 13), 1),
        "m1": whole(23),
    },
)


def _gpt_scan(d=11, h=3, k=5, v=7, m=13):
    def apply_fn(params, tokens):
        @jax.checkpoint
        def step(x, p):
            return _block(p, x, h), None

        x, _ = lax.scan(step, _embed(params["embed"], tokens), params["blocks"])
        return layer_norm(params["norm"], x) @ params["head"]

    shapes = {
        "embed": _embed_shapes(d),
        "blocks": _stacked(4, _block_shapes(d, h, k, v, m)),
        "norm": norm_shapes(d),
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 7),)


# Leaves are stacked over 4 layers. The layers come in order: their dimension is fixed. The other
# axes are as in one block, with one permutation for all layers.
GPT_SCAN = Model("gpt_scan", _gpt_scan, (3, 5, 7, 11, 13), (3, 5, 7, 13), HEADS)


def _gpt_fused(d=11, h=3, k=5, v=7, m=13):
    def apply_fn(params, tokens):
        x = _embed(params["embed"], tokens)
        y = layer_norm(params["norm0"], x) @ params["qkv"]
        query, key, value = (_heads(y, h) for y in jnp.split(y, [h * k, 2 * h * k], axis=-1))
        x = x + dense(params["o"], attend(query, key, value).reshape(*x.shape[:-1], -1))
        gate, y = jnp.split(dense(params["up"], layer_norm(params["norm1"], x)), 2, axis=-1)
        x = x + dense(params["down"], jax.nn.silu(gate) * y)
        return layer_norm(params["norm2"], x) @ params["embed"]["tokens"].T

    shapes = {
        "embed": _embed_shapes(d),
        "norm0": norm_shapes(d),
        "qkv": (d, h * k + h * k + h * v),
        "o": dense_shapes(h * v, d),
        "norm1": norm_shapes(d),
        "up": dense_shapes(d, 2 * m),
        "down": dense_shapes(m, d),
        "norm2": norm_shapes(d),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 7),)


# Tied embeddings: the columns of the token table are d, its rows the tokens. The fused kernel has
# the blocks h x k | h x k | h x v (51 columns): heads in all three, k in the first two, v in the
# last. The GLU's halves are multiplied: m in both.
GPT_FUSED = Model(
    "gpt_fused_tied",
    _gpt_fused,
    (3, 5, 7, 11, 13),
    (3, 5, 7, 13),
    {
        "d": whole(11),
        "h": blocks(51, (0, (3, 5), 0), (15, (3, 5), 0), (30, (3, 7), 0)) | merged((3, 7), 0),
        "k": blocks(51, (0, (3, 5), 1), (15, (3, 5), 1)),
        "v": blocks(51, (30, (3, 7), 1)) | merged((3, 7), 1),
        "m": whole(13) | merged((2, 13), 1),
    },
)


def _gpt_fused_equal(d=11, h=3, size=5, m=13):
    def apply_fn(params, tokens):
        x = _embed(params["embed"], tokens)
        y = layer_norm(params["norm0"], x) @ params["qkv"]
        y = y.reshape(*x.shape[:-1], 3, h, size)
        y = attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])
        x = x + dense(params["o"], y.reshape(*x.shape[:-1], -1))
        y = layer_norm(params["norm1"], x)
        x = x + dense(params["down"], jax.nn.silu(y @ params["gate"]) * dense(params["up"], y))
        return layer_norm(params["norm2"], x) @ params["head"]

    shapes = {
        "embed": _embed_shapes(d),
        "norm0": norm_shapes(d),
        "qkv": (d, 3 * h * size),
        "o": dense_shapes(h * size, d),
        "norm1": norm_shapes(d),
        "gate": (d, m),
        "up": dense_shapes(d, m),
        "down": dense_shapes(m, d),
        "norm2": norm_shapes(d),
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 7),)


# The fused columns are (3, h, size) and q, k, v are taken by index. q, k, v play three parts:
# fixed. The size of queries and keys and the size of values are equal here and still two axes:
# permuting the last factor in the first two blocks alone, or in the third and `o` alone, leaves
# the output.
GPT_FUSED_EQUAL = Model(
    "gpt_fused_equal",
    _gpt_fused_equal,
    (3, 5, 5, 11, 13),
    (3, 5, 5, 13),
    {
        "d": whole(11),
        "h": merged((3, 3, 5), 1) | merged((3, 5), 0),
        "k": blocks(45, (0, (3, 5), 1), (15, (3, 5), 1)),
        "v": blocks(45, (30, (3, 5), 1)) | merged((3, 5), 1),
        "m": whole(13),
    },
)


def _rope(x, size):
    """Rotate the pairs (i, i + size / 2) of the first `size` entries by position * frequency."""
    angle = np.arange(x.shape[1])[:, None] * 10.0 ** -np.arange(size // 2)
    sin, cos = np.sin(angle)[:, None].astype("f"), np.cos(angle)[:, None].astype("f")
    a, b, rest = jnp.split(x, [size // 2, size], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _llama(d=11, g=2, r=3, v=5, m=7):
    size = 4  # of queries and keys

    def apply_fn(params, tokens):
        x = params["tokens"][tokens]
        y = rms_norm(params["norm0"], x)
        query = _rope(_heads(y @ params["q"], g * r), size)
        key = _rope(_heads(y @ params["k"], g), size)
        value = _heads(y @ params["v"], g)
        y = attend(query, jnp.repeat(key, r, axis=2), jnp.repeat(value, r, axis=2))
        x = x + y.reshape(*x.shape[:-1], -1) @ params["o"]
        y = rms_norm(params["norm1"], x)
        x = x + (jax.nn.silu(y @ params["gate"]) * (y @ params["up"])) @ params["down"]
        return rms_norm(params["norm2"], x) @ params["head"]

    shapes = {
        "tokens": (VOCAB, d),
        "norm0": {"scale": (d,)},
        "q": (d, g * r * size),
        "k": (d, g * size),
        "v": (d, g * v),
        "o": (g * r * v, d),
        "norm1": {"scale": (d,)},
        "gate": (d, m),
        "up": (d, m),
        "down": (m, d),
        "norm2": {"scale": (d,)},
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 5),)


# Rotary positions: every pair of a query has its own frequency and its two halves turn one way:
# the size of queries and keys (4) is fixed. Grouped queries: g keys and values, each repeated for
# r queries: the query heads are g x r, both factors are axes.
LLAMA = Model(
    "llama",
    _llama,
    (2, 3, 5, 7, 11),
    (2, 3, 5, 7),
    {
        "d": whole(11),
        "g": merged((2, 3, 4), 0) | merged((2, 4), 0) | merged((2, 5), 0) | merged((2, 3, 5), 0),
        "r": merged((2, 3, 4), 1) | merged((2, 3, 5), 1),
        "v": merged((2, 5), 1) | merged((2, 3, 5), 2),
        "m": whole(7),
    },
)


def _partial_rope(d=11, h=3, s=5, v=7, m=13):
    rotated = 4

    def apply_fn(params, tokens):
        x = params["tokens"][tokens]
        y = rms_norm(params["norm0"], x)
        query, key, value = (jnp.einsum("btd,dhk->bthk", y, params[name]) for name in "qkv")
        y = attend(_rope(query, rotated), _rope(key, rotated), value)
        x = x + jnp.einsum("bthv,hvd->btd", y, params["o"])
        return (x + _mlp(params["mlp"], x)) @ params["head"]

    shapes = {
        "tokens": (VOCAB, d),
        "norm0": {"scale": (d,)},
        "q": (d, h, rotated + s),
        "k": (d, h, rotated + s),
        "v": (d, h, v),
        "o": (h, v, d),
        "mlp": {"up": dense_shapes(d, m), "down": dense_shapes(m, d)},
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 5),)


# Rotary positions on the first 4 of 9 entries of queries and keys: these are fixed, the other
# s = 5 are an axis. Kernels with a dimension for heads: nothing is merged.
PARTIAL_ROPE = Model(
    "partial_rope",
    _partial_rope,
    (3, 5, 7, 11, 13),
    (3, 5, 7, 13),
    {
        "d": whole(11),
        "h": whole(3),
        "s": blocks(9, (4, (5,), 0)),
        "v": whole(7),
        "m": whole(13),
    },
)


def _alibi(d=11, k=5, v=7, m=13):
    h = 3

    def apply_fn(params, tokens):
        x = params["tokens"][tokens]
        y = layer_norm(params["norm0"], x)
        query, key, value = (_heads(y @ params[name], h) for name in "qkv")
        place = jnp.arange(tokens.shape[1])
        bias = 0.5 ** jnp.arange(1.0, h + 1)[:, None, None] * (place[None, :] - place[:, None])
        y = attend(query, key, value, bias).reshape(*x.shape[:-1], -1)
        x = x + y @ params["o"]
        return (x + _mlp(params["mlp"], x)) @ params["head"]

    shapes = {
        "tokens": (VOCAB, d),
        "norm0": norm_shapes(d),
        "q": (d, h * k),
        "k": (d, h * k),
        "v": (d, h * v),
        "o": (h * v, d),
        "mlp": {"up": dense_shapes(d, m), "down": dense_shapes(m, d)},
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 5),)


# ALiBi: each head has its own slope over positions: the heads are fixed. The rest is free.
ALIBI = Model(
    "alibi",
    _alibi,
    (5, 7, 11, 13),
    (5, 7, 13),
    {
        "d": whole(11),
        "k": merged((3, 5), 1),
        "v": merged((3, 7), 1),
        "m": whole(13),
    },
)


def _grouped_query(d=11, g=2, r=3, k=5, v=7):
    def apply_fn(params, tokens):
        x = _embed(params["embed"], tokens)
        query = (x @ params["q"]).reshape(*x.shape[:-1], g, r, k)
        query = rms_norm(params["q_norm"], query)
        key = rms_norm(params["k_norm"], _heads(x @ params["k"], g))
        logits = jnp.einsum("btgrk,bsgk->bgrts", query, key)
        weights = jax.nn.softmax(logits, axis=-1)
        y = jnp.einsum("bgrts,bsgv->btgrv", weights, _heads(x @ params["v"], g))
        return (x + y.reshape(*x.shape[:-1], -1) @ params["o"]) @ params["head"]

    shapes = {
        "embed": _embed_shapes(d),
        "q": (d, g * r * k),
        "q_norm": {"scale": (k,)},
        "k": (d, g * k),
        "k_norm": {"scale": (k,)},
        "v": (d, g * v),
        "o": (g * r * v, d),
        "head": (d, VOCAB),
    }
    return apply_fn, draw(shapes), (ids(VOCAB, 2, 7),)


# Grouped queries as a reshape (g, r, k) and an einsum. Queries and keys are normalized over k:
# free, not removable. Nothing normalizes the residual stream: d is removable.
GROUPED_QUERY = Model(
    "grouped_query",
    _grouped_query,
    (2, 3, 5, 7, 11),
    (2, 3, 7, 11),
    {
        "d": whole(11),
        "g": merged((2, 3, 5), 0) | merged((2, 5), 0) | merged((2, 7), 0) | merged((2, 3, 7), 0),
        "r": merged((2, 3, 5), 1) | merged((2, 3, 7), 1),
        "k": whole(5) | merged((2, 5), 1) | merged((2, 3, 5), 2),
        "v": merged((2, 7), 1) | merged((2, 3, 7), 2),
    },
)

MODELS = (
    VIT,
    GPT,
    GPT_SCAN,
    GPT_FUSED,
    GPT_FUSED_EQUAL,
    LLAMA,
    PARTIAL_ROPE,
    ALIBI,
    GROUPED_QUERY,
)
