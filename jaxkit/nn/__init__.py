"""Layers as pure functions: stochastic depth, ghost batches, mixtures, dropout in closed form."""

from jaxkit.nn.depth import fold_depth, linear_decay, stochastic_depth
from jaxkit.nn.dropout import dropout_head
from jaxkit.nn.ensemble import (
    FeatureStats,
    concatenated_features,
    levi_apply,
    levi_init,
    levi_loss,
    mask_classes,
    max_probability,
)
from jaxkit.nn.ghost import GhostStats, ghost_batch_norm
from jaxkit.nn.mixed import max_w

__all__ = [
    "FeatureStats",
    "GhostStats",
    "concatenated_features",
    "dropout_head",
    "fold_depth",
    "ghost_batch_norm",
    "levi_apply",
    "levi_init",
    "levi_loss",
    "linear_decay",
    "mask_classes",
    "max_probability",
    "max_w",
    "stochastic_depth",
]
