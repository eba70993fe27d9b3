"""Small models whose axes meet in less usual ways, in plain functions."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.layers import attend, dense, dense_shapes, layer_norm, norm_shapes
from tests.zoo.model import Model, batch, blocks, draw, merged, whole


def _halves(a=5, b=7):
    def apply_fn(params, x):
        x = dense(params["first"], x)
        x = jnp.concatenate([jax.nn.relu(x[:, :a]), jnp.tanh(x[:, a:])], axis=-1)
        return dense(params["last"], x)

    shapes = {"first": dense_shapes(3, a + b), "last": dense_shapes(a + b, 2)}
    return apply_fn, draw(shapes), (batch(4, 3),)


# One hidden layer of 12, of which 5 units go through relu and 7 through tanh: two axes.
HALVES = Model(
    "two_activations",
    _halves,
    (5, 7),
    (5, 7),
    {"a": blocks(12, (0, (5,), 0)), "b": blocks(12, (5, (7,), 0))},
)


def _bilinear(a=5, b=7):
    def apply_fn(params, x):
        left, right = jnp.tanh(dense(params["left"], x)), jnp.tanh(dense(params["right"], x))
        product = left[:, :, None] * right[:, None, :]
        return dense(params["last"], product.reshape(x.shape[0], -1))

    shapes = {
        "left": dense_shapes(3, a),
        "right": dense_shapes(3, b),
        "last": dense_shapes(a * b, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# The outer product of two hidden layers: the 35 rows of the last kernel are a x b.
BILINEAR = Model(
    "bilinear",
    _bilinear,
    (5, 7),
    (5, 7),
    {"a": whole(5) | merged((5, 7), 0), "b": whole(7) | merged((5, 7), 1)},
)


def _pooled(a=4, b=5, c=7):
    def apply_fn(params, x):
        def hidden(name):
            return jnp.tanh(jnp.einsum("bi,oih->boh", x, params[name]))

        return hidden("sum").sum(-1) + hidden("mean").mean(-1) + hidden("max").max(-1)

    shapes = {"sum": (2, 3, a), "mean": (2, 3, b), "max": (2, 3, c)}
    return apply_fn, draw(shapes), (batch(8, 3),)


# Sum, mean and maximum over hidden units do not see their order, with no kernel that reads them.
# A removed unit adds tanh(0) = 0 to the sum; the mean's denominator and the maximum notice it.
POOLED = Model(
    "pooled_units",
    _pooled,
    (4, 5, 7),
    (4,),
    {"a": whole(4), "b": whole(5), "c": whole(7)},
)


def _second_order(h=5):
    def apply_fn(params, x):
        x = jnp.tanh(dense(params["first"], x))
        return jnp.einsum("bi,bj,ijo->bo", x, x, params["form"])

    shapes = {"first": dense_shapes(3, h), "form": (h, h, 2)}
    return apply_fn, draw(shapes), (batch(4, 3),)


# A quadratic form of one hidden layer: both dimensions of the form are that layer.
SECOND_ORDER = Model("second_order", _second_order, (5,), (5,), {"h": whole(5)})


def _ordered():
    def apply_fn(params, x):
        x = jnp.tanh(dense(params["first"], x)).cumsum(-1)
        x = jnp.tanh(dense(params["second"], x)) * jnp.arange(1.0, 8)
        x = jnp.tanh(dense(params["third"], x))
        return dense(params["last"], x + jnp.exp(jnp.roll(x, 1, axis=-1)))

    shapes = {
        "first": dense_shapes(3, 5),
        "second": dense_shapes(5, 7),
        "third": dense_shapes(7, 11),
        "last": dense_shapes(11, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# A cumulative sum, a factor that depends on the position and a sum with the neighbour: the units
# of these three hidden layers have an order. Nothing is free.
ORDERED = Model("ordered_units", _ordered, (), (), {})


def _sorted():
    def apply_fn(params, x):
        x = jnp.sort(jnp.tanh(dense(params["first"], x)), axis=-1)
        return dense(params["last"], x)

    shapes = {"first": dense_shapes(3, 5), "last": dense_shapes(5, 2)}
    return apply_fn, draw(shapes), (batch(4, 3),)


# Sorting forgets the order of the units that come in: an axis of the first layer alone. What
# comes out is ranked: the rows of the last kernel are fixed, and no unit can be cut.
SORTED = Model("sorted_units", _sorted, (5,), (), {"h": whole(5)}, {"h": ("first",)})


def _tcn(r=5, g0=7, g1=13, s=11):
    def conv(kernel, x, dilation=1):
        pad = [((kernel.shape[0] - 1) * dilation, 0)]
        return lax.conv_general_dilated(
            x, kernel, (1,), pad, rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    def apply_fn(params, x):
        x, skips = conv(params["embed"], x), 0
        for dilation, name in ((1, "layer0"), (2, "layer1")):
            p = params[name]
            y = jnp.tanh(conv(p["filter"], x, dilation))
            y = y * jax.nn.sigmoid(conv(p["gate"], x, dilation))
            skips = skips + conv(p["skip"], y)
            x = x + conv(p["out"], y)
        return conv(params["head"], jax.nn.relu(skips)) + conv(params["direct"], x)

    def layer(g):
        return {"filter": (2, r, g), "gate": (2, r, g), "skip": (1, g, s), "out": (1, g, r)}

    shapes = {
        "embed": (2, 3, r),
        "layer0": layer(g0),
        "layer1": layer(g1),
        "head": (1, s, 4),
        "direct": (1, r, 4),
    }
    return apply_fn, draw(shapes), (batch(2, 8, 3),)


# Causal dilated convolutions over time: the residual channels r and the skipped channels s are
# shared by the layers; the gated channels are each layer's own, in filter and gate alike.
TCN = Model(
    "dilated_gated_convolution",
    _tcn,
    (5, 7, 11, 13),
    (5, 7, 11, 13),
    {"r": whole(5), "g0": whole(7), "g1": whole(13), "s": whole(11)},
)


def _perceiver(n=9, d=11, h0=2, k0=3, v0=5, h1=4, k1=7, v1=8, m=13):
    def attention(p, x, y, heads):
        q, k, v = (z @ p[name] for z, name in ((x, "q"), (y, "k"), (y, "v")))
        q, k, v = (z.reshape(*z.shape[:-1], heads, -1) for z in (q, k, v))
        return attend(q, k, v, causal=False).reshape(*x.shape[:-1], -1) @ p["o"]

    def apply_fn(params, inputs):
        x = jnp.broadcast_to(params["latents"], (inputs.shape[0], *params["latents"].shape))
        x = x + attention(params["cross"], x, inputs, h0)
        y = layer_norm(params["norm"], x)
        x = x + attention(params["self"], y, y, h1)
        x = x + dense(params["down"], jax.nn.gelu(dense(params["up"], x)))
        return dense(params["head"], x.mean(1))

    def shapes(n_in, h, k, v):
        return {"q": (d, h * k), "k": (n_in, h * k), "v": (n_in, h * v), "o": (h * v, d)}

    params = {
        "latents": (n, d),
        "cross": shapes(4, h0, k0, v0),
        "norm": norm_shapes(d),
        "self": shapes(d, h1, k1, v1),
        "up": dense_shapes(d, m),
        "down": dense_shapes(m, d),
        "head": dense_shapes(d, 3),
    }
    return apply_fn, draw(params), (batch(2, 6, 4),)


# Learned latents attend to the inputs, then to each other; their mean is read out. Nothing tells
# the latents apart but their values: n is an axis of one dimension of one leaf, and it passes
# through softmax and mean: not removable. d passes through LayerNorm. Heads, k and v are each
# attention's own, and m: removable.
PERCEIVER = Model(
    "perceiver",
    _perceiver,
    (2, 3, 4, 5, 7, 8, 9, 11, 13),
    (2, 3, 4, 5, 7, 8, 13),
    {
        "n": whole(9),
        "d": whole(11),
        "h0": merged((2, 3), 0) | merged((2, 5), 0),
        "k0": merged((2, 3), 1),
        "v0": merged((2, 5), 1),
        "h1": merged((4, 7), 0) | merged((4, 8), 0),
        "k1": merged((4, 7), 1),
        "v1": merged((4, 8), 1),
        "m": whole(13),
    },
)

MODELS = (HALVES, BILINEAR, POOLED, SECOND_ORDER, ORDERED, SORTED, TCN, PERCEIVER)
