"""Losses: penalties and objectives, as functions of what a model computes."""

from jaxkit.losses.activation import kurtosis, kurtosis_penalty, outlier_channels
from jaxkit.losses.adapt import target_posterior
from jaxkit.losses.distill import compatibility_loss, kd_loss
from jaxkit.losses.logits import z_loss

__all__ = [
    "compatibility_loss",
    "kd_loss",
    "kurtosis",
    "kurtosis_penalty",
    "outlier_channels",
    "target_posterior",
    "z_loss",
]
