"""Models of dense layers in plain functions."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.layers import dense, dense_shapes, layer_norm, norm_shapes
from tests.zoo.model import Model, batch, draw, whole


def _mlp(h1=5, h2=7):
    def apply_fn(params, x):
        x = jax.nn.relu(dense(params["first"], x))
        x = jnp.tanh(dense(params["second"], x))
        return dense(params["last"], x)

    shapes = {
        "first": dense_shapes(3, h1),
        "second": dense_shapes(h1, h2),
        "last": dense_shapes(h2, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# The inputs (3) and the classes (2) are fixed. Each hidden layer is an axis: columns of its
# kernel, its bias, rows of the next kernel. Only element-wise functions and sums: both removable.
MLP = Model("mlp", _mlp, (5, 7), (5, 7), {"h1": whole(5), "h2": whole(7)})


@jax.custom_vjp
def _swish(x):
    return x * jax.nn.sigmoid(x)


def _swish_backward(x, g):
    s = jax.nn.sigmoid(x)
    return (g * s * (1 + x * (1 - s)),)


_swish.defvjp(lambda x: (_swish(x), x), _swish_backward)


def _wrapped(h1=5, h2=7):
    @jax.jit
    def one(params, x):
        @jax.checkpoint
        def hidden(p, x):
            return _swish(dense(p, x))

        positive = x[0] > 0
        x = hidden(params["first"], x)
        x = lax.cond(
            positive,
            lambda p, x: jax.nn.relu(dense(p["left"], x)),
            lambda p, x: jnp.tanh(dense(p["right"], x)),
            params,
            x,
        )
        return dense(params["last"], x)

    def apply_fn(params, x):
        return lax.map(lambda row: one(params, row), x)

    shapes = {
        "first": dense_shapes(3, h1),
        "left": dense_shapes(h1, h2),
        "right": dense_shapes(h1, h2),
        "last": dense_shapes(h2, 2),
    }
    return apply_fn, draw(shapes), (batch(8, 3),)


# The same MLP inside jit, remat, custom_vjp, cond and map (scan over rows). The second hidden
# layer is one axis: both branches produce it and one kernel consumes it.
WRAPPED = Model("mlp_wrapped", _wrapped, (5, 7), (5, 7), {"h1": whole(5), "h2": whole(7)})


def _low_rank(r0=2, h=7, r1=5):
    def apply_fn(params, x):
        p = params["first"]
        x = jax.nn.relu(x @ p["down"] @ p["up"] + p["bias"])
        p = params["last"]
        return x @ (p["down"] @ p["up"]) + p["bias"]  # the product of the leaves comes first

    shapes = {
        "first": {"down": (3, r0), "up": (r0, h), "bias": (h,)},
        "last": {"down": (h, r1), "up": (r1, 4), "bias": (4,)},
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# Each rank is an axis (columns of down, rows of up), and so is the hidden layer between the two
# products. Sums and relu: all removable.
LOW_RANK = Model(
    "low_rank",
    _low_rank,
    (2, 5, 7),
    (2, 5, 7),
    {"r0": whole(2), "h": whole(7), "r1": whole(5)},
)


def _recurrent(h=5):
    def apply_fn(params, x):
        p = params["cell"]
        first = jnp.zeros((x.shape[0], h))
        last = lax.fori_loop(
            0, 3, lambda _, z: jnp.tanh(z @ p["hidden"] + x @ p["input"] + p["bias"]), first
        )
        return dense(params["last"], last)

    shapes = {
        "cell": {"hidden": (h, h), "input": (3, h), "bias": (h,)},
        "last": dense_shapes(h, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# The output of W is its input in the next step: both dimensions of W are one axis, P' W P.
# tanh(0) = 0 and sums: removable.
RECURRENT = Model("recurrent", _recurrent, (5,), (5,), {"h": whole(5)})


def _equilibrium(h=5):
    def apply_fn(params, x):
        p = params["cell"]

        def step(state):
            count, z = state
            return count + 1, jnp.tanh(z @ p["hidden"] + x @ p["input"] + p["bias"])

        zeros = jnp.zeros((x.shape[0], h))
        _, z = lax.while_loop(lambda state: state[0] < 4, step, (0, zeros))
        return dense(params["last"], z)

    shapes = {
        "cell": {"hidden": (h, h), "input": (3, h), "bias": (h,)},
        "last": dense_shapes(h, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# The same in a while loop, whose constants the params are.
EQUILIBRIUM = Model("equilibrium", _equilibrium, (5,), (5,), {"h": whole(5)})


def _experts(d=5, e=4, m=7):
    def apply_fn(params, x):
        x = jnp.tanh(dense(params["embed"], x))
        gate = jax.nn.softmax(x @ params["gate"], axis=-1)
        hidden = jax.nn.gelu(jnp.einsum("bd,edm->bem", x, params["up"]))
        out = jnp.einsum("bem,emd->bed", hidden, params["down"])
        return dense(params["last"], x + jnp.einsum("be,bed->bd", gate, out))

    shapes = {
        "embed": dense_shapes(3, d),
        "gate": (d, e),
        "up": (e, d, m),
        "down": (e, m, d),
        "last": dense_shapes(d, 2),
    }
    return apply_fn, draw(shapes), (batch(4, 3),)


# Axes: the residual stream d; the experts e, permuted in the gate, up and down; their hidden
# layer m (one permutation for all experts). A zeroed expert still takes exp(0) of the softmax:
# e is not removable; d and m see only sums and element-wise functions.
EXPERTS = Model(
    "mixture_of_experts",
    _experts,
    (4, 5, 7),
    (5, 7),
    {"d": whole(5), "e": whole(4), "m": whole(7)},
)


def _mixer(d=7, s=5, m=11):
    def apply_fn(params, x):
        b = x.shape[0]
        x = x.reshape(b, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(b, 9, 8)
        x = dense(params["embed"], x)  # (b, tokens, d)
        y = layer_norm(params["norm0"], x).swapaxes(1, 2)
        y = jax.nn.gelu(dense(params["token_up"], y)) @ params["token_down"]
        x = x + y.swapaxes(1, 2)
        y = layer_norm(params["norm1"], x)
        x = x + dense(params["channel_down"], jax.nn.gelu(dense(params["channel_up"], y)))
        return dense(params["head"], layer_norm(params["norm2"], x).mean(1))

    shapes = {
        "embed": dense_shapes(8, d),
        "norm0": norm_shapes(d),
        "token_up": dense_shapes(9, s),
        "token_down": (s, 9),
        "norm1": norm_shapes(d),
        "channel_up": dense_shapes(d, m),
        "channel_down": dense_shapes(m, d),
        "norm2": norm_shapes(d),
        "head": dense_shapes(d, 2),
    }
    return apply_fn, draw(shapes), (batch(2, 6, 6, 2),)


# The 9 tokens and the 8 pixels of a patch are positions of the input: fixed (the final mean over
# tokens would allow to permute them, the input does not). The second token layer has no bias: it
# would add the same to all channels of a token, which the last LayerNorm takes away. Axes: the
# channels d, through LayerNorm (free, not removable); the hidden layers s over tokens and m over
# channels, removable.
MIXER = Model(
    "mlp_mixer",
    _mixer,
    (5, 7, 11),
    (5, 11),
    {"d": whole(7), "s": whole(5), "m": whole(11)},
)

MODELS = (MLP, WRAPPED, LOW_RANK, RECURRENT, EQUILIBRIUM, EXPERTS, MIXER)
