"""Checks of numbers that may be Python's, numpy's, jax's (closed over under jit), or traced."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxkit import tree


def violates(holds: Callable[..., Any], *values: Any) -> bool:
    """Tell whether all values are known, and a condition does not hold of them.

    The condition sees numpy arrays: a comparison of jax arrays would be traced under jit, known or
    not, and its result could not be asked.

    >>> violates(lambda r: (0 < r) & (r <= 1), 1.5), violates(lambda low, high: low < high, 1, 2)
    (True, False)
    """
    return tree.concrete(values) and not np.all(holds(*map(np.asarray, values)))
