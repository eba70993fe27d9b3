"""Rows of masks: sparse, dynamic and partial training."""

import jax
import optax

from jaxkit import masks
from tests.rows.base import KEY, Row, half

negative = lambda params: jax.tree.map(lambda x: -x, params)

ROWS = [
    Row(
        "masks.grow",
        lambda key, params, batch, n: masks.grow(
            masks.prune(half(params), masks.magnitude(params), n), negative(params), half(params)
        ),
        number=0.5,
    ),
]

OPTIMIZERS = [
    Row("masks.constrain", lambda params, n: masks.constrain(optax.adam(n), half), number=0.1),
    Row(
        "masks.set",
        lambda params, n: masks.set(optax.adam(0.1), half, key=KEY, every=2, drop_rate=n),
        number=0.5,
    ),
    Row(
        "masks.granet",
        lambda params, n: masks.granet(
            optax.adam(0.1), n, end=2, steps=4, every=1, mask=half, initial_sparsity=0.25
        ),
        number=0.8,
    ),
]

EXEMPT = {"masks.ConstrainState": "a type", "masks.Memory": "a type"}
