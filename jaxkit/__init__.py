"""jaxkit: research on neural-network weights in JAX, as pure functions on pytrees."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxkit import data, init, losses, masks, nn, optim, probes, reparam, trace, tree, weights

__all__ = [
    "data",
    "init",
    "losses",
    "masks",
    "nn",
    "optim",
    "probes",
    "reparam",
    "trace",
    "tree",
    "weights",
]


def __getattr__(name: str):  # families are imported when they are used
    if name in __all__:
        return importlib.import_module(f"jaxkit.{name}")
    raise AttributeError(f"module 'jaxkit' has no attribute {name!r}")
