"""Rows of masks: sparse, dynamic and partial training."""

import optax

from jaxkit import masks
from tests.rows.base import Row, half

OPTIMIZERS = [
    Row("masks.constrain", lambda params, n: masks.constrain(optax.adam(n), half), number=0.1),
]

EXEMPT = {"masks.ConstrainState": "a type"}
