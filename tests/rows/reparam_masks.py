"""Rows of masks over frozen weights, gates, quantization, prompts and packed masks."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import data, losses, masks, reparam, trace, tree
from tests.rows.base import MLP, Row, axes_of, every_axis, examples, half, mlp, square


def scores_of(key, params):
    """Scores without ties for every weight, of either sign."""
    draw = jax.nn.initializers.normal(1.0)
    r = reparam.supermask(draw, lambda z: {p: s > -9 for p, s in z.items()})
    return r.init(key, params)


def once(r):
    """Start a reparametrization and apply it."""
    return lambda key, params, batch, n: (lambda r: r.apply(r.init(key, params), params))(r(n))


def gates_of(params, n):
    sizes = {name: axis.size for name, axis in trace.named(axes_of(params)).items()}
    return {name: n * jnp.linspace(0.1, 0.9, size) for name, size in sizes.items()}


def read(params):
    """Roles of leaves whose dimensions are all read."""
    return jax.tree.map(lambda w: trace.Role("kernel", ("consumed",) * np.ndim(w)), params)


def negative(params):
    flip = lambda x: -x if tree.is_inexact(x) else x
    return jax.tree.map(flip, params)


ROWS = [
    Row(
        "reparam.leafwise",
        once(lambda n: reparam.leafwise(lambda k, p, w: jnp.ones(()), lambda s, w: n * s * w)),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row(
        "reparam.matched",
        lambda key, params, batch, n: reparam.matched(params, tree.flatten(params)),
        smooth=True,
    ),
    Row(
        "reparam.install",
        lambda key, params, batch, n: reparam.install(params, tree.chosen(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "reparam.straight_through",
        lambda key, params, batch, n: reparam.straight_through(batch, batch > n),
        number=1.0,
        shards=False,
    ),
    Row(
        "reparam.supermask",
        once(
            lambda n: reparam.supermask(
                jax.nn.initializers.normal(1.0),
                lambda z: {p: s > n - 9 for p, s in z.items()},
            )
        ),
        number=8.5,
        random=True,
        like_params=True,
    ),
    Row(
        "reparam.learned_mask",
        lambda key, params, batch, n: reparam.learned_mask(
            reparam.edge_popup(n), scores_of(key, params), params
        ),
        number=0.5,
        random=True,
    ),
    Row(
        "reparam.edge_popup",
        once(lambda n: reparam.edge_popup(n)),
        number=0.5,
        random=True,
        like_params=True,
    ),
    Row(
        "reparam.biprop",
        once(lambda n: reparam.biprop(n)),
        number=0.5,
        random=True,
        like_params=True,
    ),
    Row(
        "reparam.signed_supermask",
        once(lambda n: reparam.signed_supermask(n)),
        number=0.4,
        random=True,
        like_params=True,
    ),
    Row(
        "reparam.mask_tuning",
        once(lambda n: reparam.mask_tuning(start=n, threshold=n / 2)),
        number=0.01,
        like_params=True,
        smooth=True,
    ),
    Row(
        "reparam.mask_norm",
        lambda key, params, batch, n: reparam.mask_norm(tree.chosen(params), eps=n),
        number=1e-3,
        smooth=True,
    ),
    Row(
        "reparam.random_signs",
        lambda key, params, batch, n: reparam.random_signs(n)(key, (4, 3), jnp.float32),
        number=3.0,
        random=True,
    ),
    Row(
        "reparam.recycle",
        lambda key, params, batch, n: reparam.recycle(params, scores_of(key, params), n),
        number=0.25,
        random=True,
        like_params=True,
        local=False,  # it sorts
    ),
    Row(
        "reparam.iterand",
        lambda key, params, batch, n: reparam.iterand(
            key, lambda key, params: negative(params), params, half(params), n
        ),
        number=0.5,
        random=True,
        like_params=True,
    ),
    Row(
        "reparam.jackpots",
        lambda key, params, batch, n: (lambda r: r.apply(r.init(key, params), params))(
            reparam.jackpots(half(params))
        ),
        like_params=True,
    ),
    Row(
        "reparam.swap",
        lambda key, params, batch, n: reparam.swap(half(params), scores_of(key, params), n),
        number=0.5,
        random=True,
    ),
    Row(
        "reparam.fake_quantize",
        lambda key, params, batch, n: reparam.fake_quantize(batch, -n, n),
        number=1.1,
        shards=False,
    ),
    Row(
        "reparam.quantized_inputs",
        lambda key, params, batch, n: reparam.quantized_inputs(
            mlp, {"up": (-n, n), "down": (0.0, n)}
        )(MLP, batch),
        number=2.0,
        shards=False,
        tol=1e-4,
    ),
    Row(
        "reparam.gate",
        lambda key, params, batch, n: reparam.gate(
            {"a": batch - 1, "b": batch[0]}, n, mode="gumbel", key=key
        ),
        number=2.0,
        random=True,
        shards=False,
    ),
    Row(
        "reparam.gate_penalty",
        lambda key, params, batch, n: reparam.gate_penalty(tree.chosen(params), n),
        number=2.0,
        smooth=True,
    ),
    Row(
        "reparam.temperature",
        lambda key, params, batch, n: reparam.temperature(n, 20),
        number=5.0,
    ),
    Row(
        "reparam.gate_units",
        lambda key, params, batch, n: reparam.gate_units(
            params, gates_of(params, n), every_axis(params), read(params)
        ),
        number=1.0,
        like_params=True,
        local=False,  # vectors of gates are gathered, no leaf is
        smooth=True,
    ),
    Row(
        "reparam.expected_entries",
        lambda key, params, batch, n: reparam.expected_entries(
            params, gates_of(params, n), every_axis(params)
        ),
        number=1.0,
    ),
    Row(
        "reparam.budget_pressure",
        lambda key, params, batch, n: reparam.budget_pressure(n, 2.0, full=9.0),
        number=3.0,
    ),
    Row(
        "reparam.optfs",
        once(lambda n: reparam.optfs(n, where=None)),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row(
        "reparam.keep_rows",
        lambda key, params, batch, n: reparam.keep_rows(
            params,
            {p: jnp.arange(w.shape[0]) % 2 == 0 for p, w in tree.chosen(params).items()},
            start=n,
        ),
        number=0.5,
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.gradient_dropout",
        lambda key, params, batch, n: masks.gradient_dropout(
            key, params, negative(params), level=n
        ),
        number=0.5,
        random=True,
        like_params=True,
    ),
    Row(
        "masks.pack",
        lambda key, params, batch, n: masks.pack(half(params)),
        local=False,  # bits of a byte may lie on two devices
    ),
    Row(
        "masks.unpack",
        lambda key, params, batch, n: masks.unpack(masks.pack(half(params)), params),
        local=False,
    ),
    Row(
        "losses.kurtosis",
        lambda key, params, batch, n: losses.kurtosis(jnp.sin(7 * batch.reshape(-1, 8)), eps=n),
        number=1e-3,
        shards=False,
    ),
    Row(
        "losses.kurtosis_penalty",
        lambda key, params, batch, n: losses.kurtosis_penalty(mlp, eps=n)(MLP, batch)[1],
        number=1e-3,
        shards=False,
        tol=1e-4,
    ),
    Row(
        "losses.outlier_channels",
        lambda key, params, batch, n: losses.outlier_channels(batch.reshape(-1, 8) ** 3, factor=n),
        number=1.5,
        shards=False,
    ),
    Row(
        "data.visual_prompt",
        lambda key, params, batch, n: data.visual_prompt(
            square(batch)[..., None], n * jnp.ones((6, 6, 1)), 3
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "data.random_mapping",
        lambda key, params, batch, n: data.random_mapping(key, 9, 7),
        random=True,
    ),
    Row(
        "data.count_predictions",
        lambda key, params, batch, n: data.count_predictions(
            jnp.sin(7 * examples(batch)[0]), examples(batch)[1], 3
        ),
        shards=False,
    ),
    Row(
        "data.frequency_mapping",
        lambda key, params, batch, n: data.frequency_mapping((9 * jnp.sin(7 * batch)).astype(int)),
        shards=False,
    ),
]

OPTIMIZERS = []

_SHAPES = "its shapes depend on the values of a mask; tested in masks/test_export.py"

EXEMPT = {
    "reparam.Reparam": "a type",
    "reparam.Theta": "a type",
    "masks.BlockSparse": "a type",
    "masks.NOfM": "a type",
    "masks.pack_blocks": _SHAPES,
    "masks.pack_n_of_m": _SHAPES,
    "masks.sparse_matmul": "of packed matrices; tested in masks/test_export.py",
    "masks.to_bcoo": _SHAPES,
    "masks.to_bcsr": _SHAPES,
    "masks.to_dense": "of packed matrices; tested in masks/test_export.py",
}
