"""Data: corruptions of labelled sets, and networks that interpolate them."""

from jaxkit.data.corrupt import gaussian, random_labels, random_pixels, shuffled_pixels
from jaxkit.data.interpolate import TwoLayer, evaluate, two_layer

__all__ = [
    "TwoLayer",
    "evaluate",
    "gaussian",
    "random_labels",
    "random_pixels",
    "shuffled_pixels",
    "two_layer",
]
