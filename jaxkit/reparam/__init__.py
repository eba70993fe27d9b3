"""Reparametrizations: theta in, params out; what is trained is theta."""

from jaxkit.reparam.core import Reparam, Theta, install, leafwise, matched
from jaxkit.reparam.jackpot import jackpots, swap
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
    "install",
    "iterand",
    "jackpots",
    "leafwise",
    "learned_mask",
    "mask_norm",
    "mask_tuning",
    "matched",
    "random_signs",
    "recycle",
    "signed_supermask",
    "straight_through",
    "supermask",
    "swap",
]
