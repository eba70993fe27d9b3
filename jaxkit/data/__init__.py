"""Data: corruptions of labelled sets, and networks that interpolate them."""

from jaxkit.data.corrupt import gaussian, random_labels, random_pixels, shuffled_pixels
from jaxkit.data.interpolate import TwoLayer, evaluate, two_layer
from jaxkit.data.prompt import count_predictions, frequency_mapping, random_mapping, visual_prompt

__all__ = [
    "TwoLayer",
    "count_predictions",
    "evaluate",
    "frequency_mapping",
    "gaussian",
    "random_labels",
    "random_mapping",
    "random_pixels",
    "shuffled_pixels",
    "two_layer",
    "visual_prompt",
]
