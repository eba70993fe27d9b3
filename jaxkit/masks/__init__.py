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
from jaxkit.masks.dynamic import gradual, granet, grow, regrow, rigl, set, update_mask
from jaxkit.masks.flow import prune_in_rounds, synflow, synflow_mask
from jaxkit.masks.patterns import bernoulli, blocks, n_of_m, sample, threshold
from jaxkit.masks.report import Report, report
from jaxkit.masks.rescale import rescale, sketch
from jaxkit.masks.score import gumbel, magnitude, movement, random
from jaxkit.masks.select import Mask, apply, prune, topk
from jaxkit.masks.sensitivity import grasp, obd, snip, tempered
from jaxkit.masks.sparsity_index import pq_index, sap_fraction
from jaxkit.masks.structured import Shrunk, shrink, units
from jaxkit.masks.tickets import Stability, Ticket, reinit, shuffle, stability, tickets
from jaxkit.masks.train import (
    ConstrainState,
    Memory,
    Rule,
    SparseState,
    constrain,
    current,
    hold,
    sparse,
)

__all__ = [
    "ConstrainState",
    "Mask",
    "Memory",
    "Report",
    "Rule",
    "Shrunk",
    "SparseState",
    "Stability",
    "Ticket",
    "apply",
    "balanced",
    "bernoulli",
    "blocks",
    "constrain",
    "current",
    "er",
    "erk",
    "erk_plus",
    "gradual",
    "granet",
    "grasp",
    "grow",
    "gumbel",
    "hold",
    "magnitude",
    "movement",
    "n_of_m",
    "obd",
    "pointwise",
    "pq_index",
    "prune",
    "prune_in_rounds",
    "pyramidal",
    "random",
    "ratios",
    "regrow",
    "reinit",
    "report",
    "rescale",
    "rigl",
    "sample",
    "sap_fraction",
    "set",
    "shrink",
    "shuffle",
    "sketch",
    "snip",
    "sparse",
    "stability",
    "synflow",
    "synflow_mask",
    "tempered",
    "threshold",
    "tickets",
    "topk",
    "uniform",
    "uniform_plus",
    "units",
    "update_mask",
]
