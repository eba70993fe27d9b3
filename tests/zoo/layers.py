"""The layers of the plain models, as a user without a framework writes them."""

import jax
import jax.numpy as jnp
from jax import lax

SCALE = 0.5  # of the attention logits: a constant, so that a smaller model has the same


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def dense_shapes(n_in, n_out):
    return {"kernel": (n_in, n_out), "bias": (n_out,)}


def conv(kernel, x, stride=1, padding="SAME", groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def batch_norm(p, x):
    """With running statistics: an affine map per channel."""
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-3) * p["scale"] + p["bias"]


def batch_norm_shapes(n):
    return {"scale": (n,), "bias": (n,), "mean": (n,), "var": (n,)}


def group_norm(p, x, groups):
    y = x.reshape(*x.shape[:-1], groups, -1)
    mean = y.mean((1, 2, 4), keepdims=True)
    var = y.var((1, 2, 4), keepdims=True)
    return ((y - mean) * lax.rsqrt(var + 1e-3)).reshape(x.shape) * p["scale"] + p["bias"]


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-3) * p["scale"] + p["bias"]


def rms_norm(p, x):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * p["scale"]


def norm_shapes(n):
    return {"scale": (n,), "bias": (n,)}


def attend(q, k, v, bias=0.0, causal=True):
    """q (b, t, h, k), k (b, s, h, k), v (b, s, h, v) -> (b, t, h, v)."""
    logits = jnp.einsum("bthk,bshk->bhts", q, k) * SCALE + bias
    if causal:
        t, s = logits.shape[-2:]
        logits = jnp.where(jnp.tril(jnp.ones((t, s), bool)), logits, -1e9)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits, axis=-1), v)
