"""Reparametrizations: theta in, params out; what is trained is theta."""

from jaxkit.reparam.core import Reparam, Theta, install, leafwise, matched
from jaxkit.reparam.jackpot import jackpots, swap
from jaxkit.reparam.quantize import fake_quantize, quantized_inputs
from jaxkit.reparam.recycle import iterand, recycle
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

__all__ = [
    "Reparam",
    "Theta",
    "biprop",
    "edge_popup",
    "fake_quantize",
    "install",
    "iterand",
    "jackpots",
    "leafwise",
    "learned_mask",
    "mask_norm",
    "mask_tuning",
    "matched",
    "quantized_inputs",
    "random_signs",
    "recycle",
    "signed_supermask",
    "straight_through",
    "supermask",
    "swap",
]
