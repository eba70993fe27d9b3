"""Reparametrizations: theta in, params out; what is trained is theta."""

from jaxkit.reparam.core import Reparam, Theta, install, leafwise, matched
from jaxkit.reparam.gates import (
    budget_pressure,
    expected_entries,
    gate,
    gate_penalty,
    gate_units,
    keep_rows,
    optfs,
    temperature,
)
from jaxkit.reparam.jackpot import jackpots, swap
from jaxkit.reparam.quantize import fake_quantize, quantized_inputs
from jaxkit.reparam.recycle import iterand, recycle
from jaxkit.reparam.subset import compact, grafting, hardened
from jaxkit.reparam.supermask import (
    biprop,
    edge_popup,
    learned_mask,
    mask_norm,
    mask_tuning,
    random_signs,
    signed_supermask,
    straight_through,
    supermask,
)
from jaxkit.reparam.threshold import soft_threshold

__all__ = [
    "Reparam",
    "Theta",
    "biprop",
    "budget_pressure",
    "compact",
    "edge_popup",
    "expected_entries",
    "fake_quantize",
    "gate",
    "gate_penalty",
    "gate_units",
    "grafting",
    "hardened",
    "install",
    "iterand",
    "jackpots",
    "keep_rows",
    "leafwise",
    "learned_mask",
    "mask_norm",
    "mask_tuning",
    "matched",
    "optfs",
    "quantized_inputs",
    "random_signs",
    "recycle",
    "signed_supermask",
    "soft_threshold",
    "straight_through",
    "supermask",
    "swap",
    "temperature",
]
