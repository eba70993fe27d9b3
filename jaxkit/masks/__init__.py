"""Masks: score x allocation x selection, sparse training, and what a mask is worth."""

from jaxkit.masks import circuit, nested, route, subnets, tokens
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
from jaxkit.masks.connect import connect, er_width
from jaxkit.masks.continual import Task, Transfer, cl_dst, recall, remember, transfer
from jaxkit.masks.costs import Costs, costs, flops
from jaxkit.masks.dynamic import gradual, granet, rigl, set
from jaxkit.masks.exchange import grow, regrow, update_mask
from jaxkit.masks.export import (
    BlockSparse,
    NOfM,
    pack_blocks,
    pack_n_of_m,
    sparse_matmul,
    to_bcoo,
    to_bcsr,
    to_dense,
)
from jaxkit.masks.finetune import hft, lt_sft, sara, sara_penalty, small
from jaxkit.masks.flow import prune_in_rounds, synflow, synflow_mask
from jaxkit.masks.gradient_dropout import gradient_dropout
from jaxkit.masks.graft import graft, most_moved, overlap
from jaxkit.masks.graph import Layered, layered, recurrent
from jaxkit.masks.greedy import Greedy, Visit, greedy_removal, hard_attention
from jaxkit.masks.isoflop import IsoFlop, doped, factorized, folded_decay, parallel, wide
from jaxkit.masks.layers import layer_mask, layer_scores, layer_tickets, residual_blocks
from jaxkit.masks.memcontrol import memcontrol, memorization, switch
from jaxkit.masks.pack import pack, unpack
from jaxkit.masks.partition import Partition, canvas, early_bird, partition, partition_distance
from jaxkit.masks.patch import Entries, Patch, compose, difference, fingerprint, revert
from jaxkit.masks.patterns import bernoulli, blocks, n_of_m, sample, threshold
from jaxkit.masks.random_search import Searched, random_search, random_units
from jaxkit.masks.reach import Effective, effective
from jaxkit.masks.report import Report, hamming, iou, report
from jaxkit.masks.rescale import rescale, sketch
from jaxkit.masks.scaling import Law, fit_law, transformer_flops
from jaxkit.masks.schedule import average_density, compute_window, exponential, iterative
from jaxkit.masks.score import gumbel, magnitude, movement, random
from jaxkit.masks.select import Mask, apply, prune, topk
from jaxkit.masks.sensitivity import grasp, obd, snip, tempered
from jaxkit.masks.sparsity_index import pq_index, sap_fraction
from jaxkit.masks.spline import fold_norm, hyperplanes, spline
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
from jaxkit.masks.unit_scores import (
    apoz,
    bn_scale,
    fpgm,
    group_lasso,
    hrank,
    taylor,
    unit_matrices,
    unit_norm,
)

__all__ = [
    "BlockSparse",
    "ConstrainState",
    "Costs",
    "Effective",
    "Entries",
    "Greedy",
    "IsoFlop",
    "Law",
    "Layered",
    "Mask",
    "Memory",
    "NOfM",
    "Partition",
    "Patch",
    "Report",
    "Rule",
    "Searched",
    "Shrunk",
    "SparseState",
    "Stability",
    "Task",
    "Ticket",
    "Transfer",
    "Visit",
    "apoz",
    "apply",
    "average_density",
    "balanced",
    "bernoulli",
    "blocks",
    "bn_scale",
    "canvas",
    "circuit",
    "cl_dst",
    "compose",
    "compute_window",
    "connect",
    "constrain",
    "costs",
    "current",
    "difference",
    "doped",
    "early_bird",
    "effective",
    "er",
    "er_width",
    "erk",
    "erk_plus",
    "exponential",
    "factorized",
    "fingerprint",
    "fit_law",
    "flops",
    "fold_norm",
    "folded_decay",
    "fpgm",
    "gradient_dropout",
    "gradual",
    "graft",
    "granet",
    "grasp",
    "greedy_removal",
    "group_lasso",
    "grow",
    "gumbel",
    "hamming",
    "hard_attention",
    "hft",
    "hold",
    "hrank",
    "hyperplanes",
    "iou",
    "iterative",
    "layer_mask",
    "layer_scores",
    "layer_tickets",
    "layered",
    "lt_sft",
    "magnitude",
    "memcontrol",
    "memorization",
    "most_moved",
    "movement",
    "n_of_m",
    "nested",
    "obd",
    "overlap",
    "pack",
    "pack_blocks",
    "pack_n_of_m",
    "parallel",
    "partition",
    "partition_distance",
    "pointwise",
    "pq_index",
    "prune",
    "prune_in_rounds",
    "pyramidal",
    "random",
    "random_search",
    "random_units",
    "ratios",
    "recall",
    "recurrent",
    "regrow",
    "reinit",
    "remember",
    "report",
    "rescale",
    "residual_blocks",
    "revert",
    "rigl",
    "route",
    "sample",
    "sap_fraction",
    "sara",
    "sara_penalty",
    "set",
    "shrink",
    "shuffle",
    "sketch",
    "small",
    "snip",
    "sparse",
    "sparse_matmul",
    "spline",
    "stability",
    "subnets",
    "switch",
    "synflow",
    "synflow_mask",
    "taylor",
    "tempered",
    "threshold",
    "tickets",
    "to_bcoo",
    "to_bcsr",
    "to_dense",
    "tokens",
    "topk",
    "transfer",
    "transformer_flops",
    "uniform",
    "uniform_plus",
    "unit_matrices",
    "unit_norm",
    "units",
    "unpack",
    "update_mask",
    "wide",
]
