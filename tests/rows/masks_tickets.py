"""Rows of masks and probes: tickets, unit scores, partitions, layer tickets, random search."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import masks, probes, tree
from jaxkit.trace import Role
from tests.rows.base import MLP, Row, axes_of, axis_or_none, draw, half, loss_fn, mlp

MLP_AXES = {"up": (None, "hidden"), "down": ("hidden", None)}
MLP_ROLES = dict.fromkeys(MLP, Role("kernel", ("consumed", "produced")))
BLOCKS = {"a": "a/*", "b": "b/*"}
RESIDUAL = {"a": {"w": jnp.array([[0.1, 0.9], [0.4, 0.2]])}, "b": {"w": 0.01 * jnp.ones((2, 2))}}


def residual(params, x):
    for name in params:
        x = x + x @ params[name]["w"]
    return x


def roles_of(params):
    """Every dimension consumes."""
    return jax.tree.map(lambda w: Role("kernel", ("consumed",) * np.ndim(w)), params)


def planes(batch):
    return {"h": (jnp.cos(jnp.arange(12.0).reshape(4, 3) * batch[0, 1]), batch.reshape(-1)[:4])}


def maps(params, x):
    """Two convolutions with a ReLU between them."""
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return conv(jax.nn.relu(conv(x, params["up"])), params["down"])


MAPS = {"up": jnp.ones((1, 1, 1, 3)), "down": jnp.ones((1, 1, 3, 1))}
MAPS_AXES = {"up": (None, None, None, "c"), "down": (None, None, "c", None)}
MAPS_ROLES = dict.fromkeys(MAPS, Role("kernel", (None, None, "consumed", "produced")))

ROWS = [
    Row(
        "masks.shuffle",
        lambda key, params, batch, n: masks.shuffle(key, jax.tree.map(lambda w: w > 0, params)),
        random=True,
    ),
    Row(
        "masks.reinit",
        lambda key, params, batch, n: masks.reinit(
            key,
            lambda key, params: draw(jax.nn.initializers.normal)(key, params, batch, n),
            params,
            half(params),
            live=True,
        ),
        number=0.1,
        random=True,
        like_params=True,
    ),
    Row(
        "masks.stability",
        lambda key, params, batch, n: masks.stability(
            params, jax.tree.map(jnp.cos, params), half(params)
        ),
        smooth=True,
        keeps=False,  # the cosine of an integer leaf is none
    ),
    Row(
        "masks.unit_matrices",
        lambda key, params, batch, n: masks.unit_matrices(params, axes_of(params), None),
        local=False,
        smooth=True,
    ),
    Row(
        "masks.unit_norm",
        lambda key, params, batch, n: masks.unit_norm(params, axes_of(params), None),
        local=False,
        smooth=True,
    ),
    Row(
        "masks.bn_scale",
        lambda key, params, batch, n: masks.bn_scale(
            params, axes_of(params), where=tree.every(params)
        ),
        local=False,
        smooth=True,
    ),
    Row(
        "masks.fpgm",
        lambda key, params, batch, n: masks.fpgm(params, axes_of(params), None),
        local=False,
        smooth=True,
    ),
    Row(
        "masks.group_lasso",
        lambda key, params, batch, n: masks.group_lasso(params, axes_of(params), None),
        local=False,
        smooth=True,
    ),
    Row(
        "masks.taylor",
        lambda key, params, batch, n: masks.taylor(
            loss_fn, params, batch, axes_of(params), roles_of(params), axis_name=axis_or_none()
        ),
        local=False,
    ),
    Row(
        "masks.apoz",
        lambda key, params, batch, n: masks.apoz(
            lambda p, x: mlp(p, x - 1), MLP, (batch,), MLP_AXES, MLP_ROLES, axis_name=axis_or_none()
        ),
    ),
    Row(
        "masks.hrank",
        lambda key, params, batch, n: masks.hrank(
            maps, MAPS, (jnp.sin(batch.reshape(2, 4, 4, 1)),), MAPS_AXES, MAPS_ROLES
        ),
        shards=False,
    ),
    Row(
        "masks.partition",
        lambda key, params, batch, n: masks.partition(mlp, MLP, batch - n),
        number=1.0,
        shards=False,
    ),
    Row(
        "masks.partition_distance",
        lambda key, params, batch, n: masks.partition_distance(
            masks.partition(mlp, MLP, batch - 1),
            masks.partition(mlp, {**MLP, "up": MLP["up"] + n}, batch - 1),
        ),
        number=0.7,
        shards=False,
    ),
    Row(
        "masks.early_bird",
        lambda key, params, batch, n: masks.early_bird(
            [masks.partition(mlp, {**MLP, "up": MLP["up"] + i}, batch - 1) for i in range(3)],
            masks.partition(mlp, MLP, batch - 1),
            threshold=n,
        ),
        number=0.2,
        shards=False,
    ),
    Row(
        "masks.canvas",
        lambda key, params, batch, n: masks.canvas(batch[0], batch[1], 3),
        shards=False,
    ),
    Row(
        "masks.hyperplanes",
        lambda key, params, batch, n: masks.hyperplanes(
            {**MLP, "up": MLP["up"] * n}, MLP_AXES, MLP_ROLES
        ),
        number=2.0,
    ),
    Row(
        "masks.fold_norm",
        lambda key, params, batch, n: masks.fold_norm(
            MLP["up"], *(jnp.arange(1.0, 5.0) * n,) * 4, kernel_bias=n
        ),
        number=2.0,
    ),
    Row(
        "masks.spline",
        lambda key, params, batch, n: masks.spline(planes(batch), bias_weight=n),
        number=0.5,
        shards=False,
    ),
    Row(
        "masks.layer_mask",
        lambda key, params, batch, n: masks.layer_mask(
            params, {"all": n > 0.5}, {"all": tree.every(params)}
        ),
        number=1.0,
    ),
    Row(
        "masks.layer_scores",
        lambda key, params, batch, n: masks.layer_scores(
            residual, jax.tree.map(lambda w: w * n, RESIDUAL), (batch,), BLOCKS
        ),
        number=1.0,
        shards=False,
    ),
    Row(
        "masks.layer_tickets",
        lambda key, params, batch, n: masks.layer_tickets(
            residual, jax.tree.map(lambda w: w * n, RESIDUAL), (batch,), BLOCKS, remove=1
        ),
        number=1.0,
        shards=False,
    ),
    Row(
        "masks.random_units",
        lambda key, params, batch, n: masks.random_units(key, MLP, MLP_AXES, n),
        number=0.5,
        random=True,
    ),
    Row(
        "masks.random_search",
        lambda key, params, batch, n: masks.random_search(
            key, lambda p, x: jnp.sin(mlp(p, x)).sum(), MLP, batch, MLP_AXES, sparsity=n, draws=5
        ),
        number=0.5,
        random=True,
        shards=False,
    ),
    Row(
        "probes.cka",
        lambda key, params, batch, n: probes.cka(jnp.sin(batch), batch**2),
        shards=False,
    ),
    Row(
        "probes.lmc",
        lambda key, params, batch, n: probes.lmc(
            lambda p: loss_fn(p, batch), params, jax.tree.map(lambda w: w + w, params), points=4
        ),
        shards=False,
        smooth=True,
    ),
]

EXEMPT = {
    "masks.Searched": "a type",
    "masks.Partition": "a type",
    "masks.Stability": "a type",
    "masks.Ticket": "a type",
    "masks.residual_blocks": "host-side: which blocks may be skipped, as globs",
    "masks.tickets": "a loop over the user's training on the host, each round concrete",
    "probes.Connectivity": "a type",
}
