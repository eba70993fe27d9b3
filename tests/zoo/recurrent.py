"""Models that scan over time, in plain functions."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.layers import dense, dense_shapes, rms_norm
from tests.zoo.model import Model, batch, blocks, draw, ids, merged, whole

VOCAB = 7


def _lstm(h0=5, h1=7):
    def cell(p, state, x):
        h, c = state
        gates = jnp.concatenate([x, h], axis=-1) @ p["kernel"] + p["bias"]
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def apply_fn(params, x):
        def step(states, x):
            first, x = cell(params["cell0"], states[0], x)
            second, x = cell(params["cell1"], states[1], x)
            return (first, second), x

        zeros = tuple((jnp.zeros((x.shape[0], n)), jnp.zeros((x.shape[0], n))) for n in (h0, h1))
        _, y = lax.scan(step, zeros, x.swapaxes(0, 1))
        return dense(params["head"], y[-1])

    shapes = {
        "cell0": dense_shapes(3 + h0, 4 * h0),
        "cell1": dense_shapes(h0 + h1, 4 * h1),
        "head": dense_shapes(h1, 2),
    }
    return apply_fn, draw(shapes), (batch(2, 6, 3),)


# Two layers, each with the four gates in one kernel that reads input | state. One axis per layer:
# the state h, the cell c and each of the four gates meet element-wise. The rows of the first
# kernel are 3 fixed | h0, those of the second h0 | h1. A removed unit has state
# sigmoid(.) tanh(0) = 0: removable.
LSTM = Model(
    "lstm",
    _lstm,
    (5, 7),
    (5, 7),
    {
        "h0": blocks(8, (3, (5,), 0)) | merged((4, 5), 1) | blocks(12, (0, (5,), 0)),
        "h1": blocks(12, (5, (7,), 0)) | merged((4, 7), 1) | whole(7),
    },
)


def _gru(h=5):
    def apply_fn(params, x):
        def step(state, x):
            a = x @ params["input"] + params["bias"]
            b = state @ params["hidden"]
            reset = jax.nn.sigmoid(a[..., :h] + b[..., :h])
            update = jax.nn.sigmoid(a[..., h : 2 * h] + b[..., h : 2 * h])
            new = jnp.tanh(a[..., 2 * h :] + reset * (b[..., 2 * h :] + params["bias_new"]))
            return (1 - update) * new + update * state, None

        last, _ = lax.scan(step, jnp.zeros((x.shape[0], h)), x.swapaxes(0, 1))
        return dense(params["head"], last)

    shapes = {
        "input": (3, 3 * h),
        "hidden": (h, 3 * h),
        "bias": (3 * h,),
        "bias_new": (h,),
        "head": dense_shapes(h, 2),
    }
    return apply_fn, draw(shapes), (batch(2, 6, 3),)


# The state, the three gates (blocks of 15 columns) and the rows of the hidden kernel: one axis.
# A removed unit stays (1 - z) tanh(0) + z 0 = 0: removable.
GRU = Model("gru", _gru, (5,), (5,), {"h": whole(5) | merged((3, 5), 1)})


def _mamba(scan):
    def build(d=11, i=17, n=5, r=3):
        def apply_fn(params, tokens):
            x = params["embed"][tokens]
            y, z = jnp.split(rms_norm(params["norm"], x) @ params["in_proj"], 2, axis=-1)
            y = lax.conv_general_dilated(
                y,
                params["conv"]["kernel"],
                (1,),
                [(3, 0)],
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=i,
            )
            y = jax.nn.silu(y + params["conv"]["bias"])
            dt, b, c = jnp.split(y @ params["x_proj"], [r, r + n], axis=-1)
            dt = jax.nn.softplus(dense(params["dt_proj"], dt))
            decay = jnp.exp(dt[..., None] * -jnp.exp(params["a_log"]))  # (batch, time, i, n)
            states = scan(decay, (dt * y)[..., None] * b[:, :, None, :])
            y = (states * c[:, :, None, :]).sum(-1) + params["skip"] * y
            x = x + (y * jax.nn.silu(z)) @ params["out_proj"]
            return x @ params["head"]

        shapes = {
            "embed": (VOCAB, d),
            "norm": {"scale": (d,)},
            "in_proj": (d, 2 * i),
            "conv": {"kernel": (4, 1, i), "bias": (i,)},
            "x_proj": (i, r + 2 * n),
            "dt_proj": dense_shapes(r, i),
            "a_log": (i, n),
            "skip": (i,),
            "out_proj": (i, d),
            "head": (d, VOCAB),
        }
        return apply_fn, draw(shapes), (ids(VOCAB, 2, 6),)

    return build


def _in_sequence(decay, value):
    def step(state, now):
        state = now[0] * state + now[1]
        return state, state

    over_time = (decay.swapaxes(0, 1), value.swapaxes(0, 1))
    return lax.scan(step, jnp.zeros_like(value[:, 0]), over_time)[1].swapaxes(0, 1)


def _in_parallel(decay, value):
    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    return lax.associative_scan(combine, (decay, value), axis=1)[1]


# Axes: the residual stream d, through RMSNorm: not removable. The inner channels i: both halves of
# in_proj, the depthwise convolution (a filter per channel), rows of x_proj, columns of dt_proj,
# rows of A, the skip, rows of out_proj: element-wise or summed. The state n: columns of A and the
# blocks B and C of x_proj (13 columns: r | n | n), summed by C. The rank r of the step size. Time
# is fixed. A removed i, n or r leaves zeros in every sum: removable.
_MAMBA_LAYOUT = {
    "d": whole(11),
    "i": whole(17) | merged((2, 17), 1),
    "n": whole(5) | blocks(13, (3, (5,), 0), (8, (5,), 0)),
    "r": whole(3) | blocks(13, (0, (3,), 0)),
}
MAMBA = Model("mamba", _mamba(_in_sequence), (3, 5, 11, 17), (3, 5, 17), _MAMBA_LAYOUT)
MAMBA_PARALLEL = Model(
    "mamba_parallel", _mamba(_in_parallel), (3, 5, 11, 17), (3, 5, 17), _MAMBA_LAYOUT
)

MODELS = (LSTM, GRU, MAMBA, MAMBA_PARALLEL)
