"""Losses: penalties and objectives, as functions of what a model computes."""

from jaxkit.losses.activation import kurtosis, kurtosis_penalty, outlier_channels
from jaxkit.losses.logits import z_loss

__all__ = [
    "kurtosis",
    "kurtosis_penalty",
    "outlier_channels",
    "z_loss",
]
