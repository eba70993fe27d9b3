"""Layers as pure functions: stochastic depth, and BatchNorm over ghosts."""

from jaxkit.nn.depth import fold_depth, linear_decay, stochastic_depth
from jaxkit.nn.ghost import GhostStats, ghost_batch_norm

__all__ = ["GhostStats", "fold_depth", "ghost_batch_norm", "linear_decay", "stochastic_depth"]
