"""Rows of masks: the first selections and the optimizers."""

import jax
import optax

from jaxkit import masks
from tests.rows.base import (
    Row,
    axis_or_none,
    every_axis,
    half,
    loss_fn,
    reversed_units,
)

ROWS = [
    Row("masks.magnitude", lambda key, params, batch, n: masks.magnitude(params), smooth=True),
    Row("masks.random", lambda key, params, batch, n: masks.random(key, params), random=True),
    Row(
        "masks.snip",
        lambda key, params, batch, n: masks.snip(loss_fn, params, batch, axis_name=axis_or_none()),
    ),
    Row("masks.uniform", lambda key, params, batch, n: masks.uniform(params, n), number=0.5),
    Row("masks.erk", lambda key, params, batch, n: masks.erk(params, n), number=0.5),
    Row(
        "masks.topk",
        lambda key, params, batch, n: masks.topk(params, sparsity=n),
        number=0.5,
    ),
    Row(
        "masks.prune",
        lambda key, params, batch, n: masks.prune(half(params), masks.magnitude(params), n),
        number=0.5,
    ),
    Row(
        "masks.apply",
        lambda key, params, batch, n: masks.apply(params, half(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.units",
        lambda key, params, batch, n: masks.units(
            params,
            {name: unit % 2 == 0 for name, unit in reversed_units(params).items()},
            every_axis(params),
        ),
    ),
    Row(
        "masks.regrow",
        lambda key, params, batch, n: masks.regrow(
            half(params), params, jax.tree.map(lambda x: -x, params), drop_rate=n
        ),
        number=0.5,
    ),
    Row(
        "masks.update_mask",
        lambda key, params, batch, n: masks.update_mask(
            key, half(params), params, None, sparsity=n, drop_rate=n
        ),
        number=0.75,
        random=True,
    ),
]

OPTIMIZERS = [
    Row("masks.sparse", lambda params, n: masks.sparse(optax.adam(n), half), number=0.1),
    Row("masks.hold", lambda params, n: optax.chain(optax.adam(n), masks.hold(half)), number=0.1),
    Row("masks.gradual", lambda params, n: masks.gradual(optax.adam(0.1), n, end=3, every=1), 0.5),
    Row(
        "masks.rigl",
        lambda params, n: masks.rigl(optax.adam(0.1), half, every=2, drop_rate=n),
        number=0.5,
    ),
]

EXEMPT = {
    "masks.Mask": "a type",
    "masks.Report": "a type",
    "masks.Rule": "a type",
    "masks.Shrunk": "a type",
    "masks.SparseState": "a type",
    "masks.current": "reads a state; every optimizer row calls it",
    "masks.shrink": "its shapes depend on values; tested in masks/test_structured.py",
    "masks.report": "host-side: counts for people; tested in test_select.py",
}
