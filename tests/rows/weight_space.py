"""Rows of nn and data: layers on the weights of networks, and augmentations of networks."""

import jax
import jax.numpy as jnp

from jaxkit import data, nn, trace, tree
from tests.rows.base import KEY, Row, every_axis

SIREN = {"w": jnp.ones((2, 4)), "b": jnp.zeros(4), "v": jnp.ones((4, 3))}
ONE, TWO = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])


def siren(params, x):
    return jnp.sin(30 * (x @ params["w"] + params["b"])) @ params["v"]


def as_kernels(params):
    """Say that every dimension of every leaf produces."""
    return jax.tree.map(lambda w: trace.Role("kernel", ("produced",) * jnp.ndim(w)), params)


def features(params, n=1.0):
    return tree.map(
        lambda path, w: (n * w)[..., None].astype(w.dtype), params, where=tree.every(params)
    )


def layer(key, params, channels):
    return nn.equivariant_init(key, params, every_axis(params), 1, channels)


def head(key, params, channels):
    return nn.invariant_init(key, params, every_axis(params), 1, channels)


def layered(key, params, batch, n):
    out = nn.equivariant_apply(layer(KEY, params, 1), features(params, n), every_axis(params))
    return tree.map(lambda path, y: y[..., 0], out, where=tree.every(out))


def flipped(key, params, batch, n):
    axes, roles = every_axis(params), as_kernels(params)
    return data.flipped_signs(key, params, axes, roles, activation=jnp.tanh, rate=n)


def shifted(key, params, batch, n):
    axes = {"w": (None, "a"), "b": ("a",), "v": ("a", None)}
    roles = trace.roles(siren, SIREN, jnp.ones((1, 2)))
    return data.shifted_phases(key, SIREN, axes, roles, activation=lambda x: jnp.sin(n * x), w0=n)


def mixed(key, params, batch, n):
    twice = tree.map(lambda path, w: 2 * w, params, where=tree.every(params))
    mix = data.weight_mixup(key, params, twice, ONE, TWO, share=n)
    return mix[0]


def row(name, fn, **options):
    return Row(f"data.{name}", fn, **options)


def numbers(name, number, option):
    """Rows of what changes the numbers alone."""
    call = lambda key, params, batch, n: getattr(data, name)(
        key, params, where=tree.every(params), **{option: n}
    )
    return row(name, call, number=number, random=True, like_params=True)


ROWS = [
    # (a network without axis has no such layer; odd leaves are in nn/test_equivariant.py)
    Row(
        "nn.equivariant_init",
        lambda key, params, batch, n: layer(key, params, 2),
        random=True,
        keeps=False,
    ),
    Row(
        "nn.invariant_init",
        lambda key, params, batch, n: head(key, params, 2),
        random=True,
        keeps=False,
    ),
    Row(
        "nn.equivariant_apply",
        layered,
        number=0.5,
        like_params=True,
        local=False,
        smooth=True,
        keeps=False,
    ),
    Row(
        "nn.invariant_apply",
        lambda key, params, batch, n: nn.invariant_apply(
            head(KEY, params, 2), features(params, n), every_axis(params)
        ),
        number=0.5,
        local=False,
        smooth=True,
        keeps=False,
    ),
    row(
        "permuted_units",
        lambda key, params, batch, n: data.permuted_units(key, params, every_axis(params)),
        random=True,
        like_params=True,
        local=False,
    ),
    row("flipped_signs", flipped, number=0.5, random=True, like_params=True),
    row("shifted_phases", shifted, number=30.0, random=True),
    row(
        "rotated_inputs",
        lambda key, params, batch, n: data.rotated_inputs(key, SIREN, "w", degrees=n),
        number=30.0,
        random=True,
    ),
    row(
        "translated_inputs",
        lambda key, params, batch, n: data.translated_inputs(key, SIREN, "w", "b", scale=n),
        number=0.25,
        random=True,
    ),
    row(
        "scaled_inputs",
        lambda key, params, batch, n: data.scaled_inputs(key, params, tree.every(params), scale=n),
        number=0.2,
        random=True,
        like_params=True,
    ),
    numbers("noisy_weights", 0.3, "scale"),
    numbers("dropped_weights", 0.3, "rate"),
    numbers("trimmed_weights", 0.6, "largest"),
    row("weight_mixup", mixed, number=0.5, like_params=True, smooth=True, keeps=False),
]
