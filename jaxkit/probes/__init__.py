"""Probes: what networks have learned, and how they lie to each other."""

from jaxkit.probes.calibration import ece
from jaxkit.probes.connectivity import Connectivity, lmc
from jaxkit.probes.similarity import cka

__all__ = [
    "Connectivity",
    "cka",
    "ece",
    "lmc",
]
