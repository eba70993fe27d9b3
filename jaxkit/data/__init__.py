"""Data: corruptions of sets, networks that interpolate them, what to keep, networks as data."""

from jaxkit.data.corrupt import gaussian, random_labels, random_pixels, shuffled_pixels
from jaxkit.data.filter import perplexity, perplexity_filter
from jaxkit.data.interpolate import TwoLayer, evaluate, two_layer
from jaxkit.data.prompt import count_predictions, frequency_mapping, random_mapping, visual_prompt
from jaxkit.data.weight_augment import (
    dropped_weights,
    noisy_weights,
    rotated_inputs,
    scaled_inputs,
    translated_inputs,
    trimmed_weights,
    weight_mixup,
)
from jaxkit.data.weight_symmetry import flipped_signs, permuted_units, shifted_phases

__all__ = [
    "TwoLayer",
    "count_predictions",
    "dropped_weights",
    "evaluate",
    "flipped_signs",
    "frequency_mapping",
    "gaussian",
    "noisy_weights",
    "permuted_units",
    "perplexity",
    "perplexity_filter",
    "random_labels",
    "random_mapping",
    "random_pixels",
    "rotated_inputs",
    "scaled_inputs",
    "shifted_phases",
    "shuffled_pixels",
    "translated_inputs",
    "trimmed_weights",
    "two_layer",
    "visual_prompt",
    "weight_mixup",
]
