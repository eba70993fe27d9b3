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
from jaxkit.nn.equivariant import (
    equivariant_apply,
    equivariant_init,
    invariant_apply,
    invariant_init,
)
from jaxkit.nn.ghost import GhostStats, ghost_batch_norm
from jaxkit.nn.mixed import max_w

__all__ = [
    "FeatureStats",
    "GhostStats",
    "concatenated_features",
    "dropout_head",
    "equivariant_apply",
    "equivariant_init",
    "fold_depth",
    "ghost_batch_norm",
    "invariant_apply",
    "invariant_init",
    "levi_apply",
    "levi_init",
    "levi_loss",
    "linear_decay",
    "mask_classes",
    "max_probability",
    "max_w",
    "stochastic_depth",
]
