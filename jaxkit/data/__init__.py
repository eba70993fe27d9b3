"""Data: corruptions of labelled sets, networks that interpolate them, what to keep of a set."""

from jaxkit.data.corrupt import gaussian, random_labels, random_pixels, shuffled_pixels
from jaxkit.data.filter import perplexity, perplexity_filter
from jaxkit.data.interpolate import TwoLayer, evaluate, two_layer
from jaxkit.data.prompt import count_predictions, frequency_mapping, random_mapping, visual_prompt

__all__ = [
    "TwoLayer",
    "count_predictions",
    "evaluate",
    "frequency_mapping",
    "gaussian",
    "perplexity",
    "perplexity_filter",
    "random_labels",
    "random_mapping",
    "random_pixels",
    "shuffled_pixels",
    "two_layer",
    "visual_prompt",
]
