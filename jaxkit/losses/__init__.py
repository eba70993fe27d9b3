"""Losses: penalties and objectives, as functions of what a model computes."""

from jaxkit.losses.activation import kurtosis, kurtosis_penalty, outlier_channels

__all__ = [
    "kurtosis",
    "kurtosis_penalty",
    "outlier_channels",
]
