"""Whole sets of weights: read them from checkpoints leaf by leaf."""

from jaxkit.weights import files

__all__ = ["files"]
