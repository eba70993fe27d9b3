"""Masks: score x allocation x selection, sparse training, and what a mask is worth."""

from jaxkit.masks.allocate import erk, uniform
from jaxkit.masks.report import Report, report
from jaxkit.masks.score import magnitude, random, snip
from jaxkit.masks.select import Mask, apply, prune, topk
from jaxkit.masks.structured import Shrunk, shrink, units
from jaxkit.masks.train import (
    ConstrainState,
    Rule,
    SparseState,
    constrain,
    current,
    gradual,
    hold,
    regrow,
    rigl,
    sparse,
    update_mask,
)

__all__ = [
    "ConstrainState",
    "Mask",
    "Report",
    "Rule",
    "Shrunk",
    "SparseState",
    "apply",
    "constrain",
    "current",
    "erk",
    "gradual",
    "hold",
    "magnitude",
    "prune",
    "random",
    "regrow",
    "report",
    "rigl",
    "shrink",
    "snip",
    "sparse",
    "topk",
    "uniform",
    "units",
    "update_mask",
]
