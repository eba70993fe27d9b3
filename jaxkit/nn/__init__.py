"""Layers as pure functions: stochastic depth, ghost batches, mixtures, dropout in closed form."""

from jaxkit.nn.depth import fold_depth, linear_decay, stochastic_depth
from jaxkit.nn.dropout import dropout_head
from jaxkit.nn.ghost import GhostStats, ghost_batch_norm
from jaxkit.nn.mixed import max_w

__all__ = [
    "GhostStats",
    "dropout_head",
    "fold_depth",
    "ghost_batch_norm",
    "linear_decay",
    "max_w",
    "stochastic_depth",
]
