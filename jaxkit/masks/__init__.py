"""Masks: score x allocation x selection, sparse training, and what a mask is worth."""

from jaxkit.masks.allocate import (
    balanced,
    er,
    erk,
    erk_plus,
    pointwise,
    pyramidal,
    ratios,
    uniform,
    uniform_plus,
)
from jaxkit.masks.report import Report, report
from jaxkit.masks.score import magnitude, random, snip
from jaxkit.masks.select import Mask, apply, prune, topk
from jaxkit.masks.structured import Shrunk, shrink, units
from jaxkit.masks.tickets import Stability, Ticket, reinit, shuffle, stability, tickets
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
    "Stability",
    "Ticket",
    "apply",
    "balanced",
    "constrain",
    "current",
    "er",
    "erk",
    "erk_plus",
    "gradual",
    "hold",
    "magnitude",
    "pointwise",
    "prune",
    "pyramidal",
    "random",
    "ratios",
    "regrow",
    "reinit",
    "report",
    "rigl",
    "shrink",
    "shuffle",
    "snip",
    "sparse",
    "stability",
    "tickets",
    "topk",
    "uniform",
    "uniform_plus",
    "units",
    "update_mask",
]
