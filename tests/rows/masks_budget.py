"""Rows of masks: allocations, connection, what a mask reaches and costs, schedules, layers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import masks, tree
from tests.rows.base import MLP, Row, half, mlp


def numbered(fn):
    return lambda key, params, batch, n: fn(params, n)


def mlp_mask(n=0.5):
    return {"up": jnp.arange(8.0).reshape(2, 4) < 8 * n, "down": jnp.ones((4, 3), bool)}


ROWS = [
    Row("masks.er", numbered(masks.er), number=0.5),
    Row("masks.balanced", numbered(masks.balanced), number=0.5),
    Row("masks.pyramidal", numbered(masks.pyramidal), number=0.5, keeps=False),
    Row(
        "masks.erk_plus",
        lambda key, params, batch, n: masks.erk_plus(MLP, n, last="down"),
        number=0.25,
    ),
    Row(
        "masks.uniform_plus",
        lambda key, params, batch, n: masks.uniform_plus(MLP, n, first="up", last="down"),
        number=0.25,
    ),
    Row("masks.ratios", lambda key, params, batch, n: masks.ratios(half(params))),
    Row(
        "masks.connect",
        lambda key, params, batch, n: masks.connect(
            key, jax.tree.map(lambda w: jnp.zeros(np.shape(w), bool), params)
        ),
        random=True,
    ),
    Row(
        "masks.effective",
        lambda key, params, batch, n: masks.effective(mlp, MLP, mlp_mask(n), jnp.ones((1, 2))).mask,
        number=0.5,
    ),
    Row(
        "masks.hamming",
        lambda key, params, batch, n: masks.hamming(half(params), half(params)),
    ),
    Row("masks.iou", lambda key, params, batch, n: masks.iou(half(params), half(params))),
    Row(
        "masks.iterative",
        lambda key, params, batch, n: masks.iterative(n)(jnp.arange(4)),
        number=0.2,
    ),
    Row(
        "masks.exponential",
        lambda key, params, batch, n: masks.exponential(n, 3)(jnp.arange(4)),
        number=0.9,
    ),
    Row(
        "masks.average_density",
        lambda key, params, batch, n: masks.average_density(lambda t: jnp.where(t < 3, 0.0, n), 9),
        number=0.5,
    ),
    Row("masks.recurrent", lambda key, params, batch, n: masks.recurrent(np.eye(3, k=1), gates=2)),
    Row(
        "masks.folded_decay",
        lambda key, params, batch, n: {
            path: masks.folded_decay(n * w.reshape(-1, w.shape[-1]), w.reshape(-1, w.shape[-1]).T)
            for path, w in tree.chosen(params).items()
            if w.size
        },
        number=2.0,
        smooth=True,
        local=False,
    ),
]

EXEMPT = {
    "masks.Costs": "a type",
    "masks.Effective": "a type",
    "masks.IsoFlop": "a type",
    "masks.Law": "a type",
    "masks.Layered": "a type",
    "masks.compute_window": "host-side: steps, from Python numbers; tested in test_schedule.py",
    "masks.costs": "host-side: counts of shapes; tested in test_report.py",
    "masks.doped": "host-side: shapes, and a function of the user's; tested in test_isoflop.py",
    "masks.er_width": "host-side: a width, from Python numbers; tested in test_connect.py",
    "masks.factorized": "as masks.doped",
    "masks.fit_law": "host-side: scipy fits numbers; tested in test_scaling.py",
    "masks.flops": "host-side: a number for people; tested in test_report.py",
    "masks.layered": "host-side: its shapes depend on values; tested in test_graph.py",
    "masks.parallel": "as masks.doped",
    "masks.pointwise": "chooses leaves by their shapes; tested in test_allocate.py",
    "masks.transformer_flops": "host-side: a closed form; tested in test_scaling.py",
    "masks.wide": "host-side: a width, from Python numbers; tested in test_isoflop.py",
}
