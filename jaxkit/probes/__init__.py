"""Probes: what networks have learned, and how they lie to each other."""

from jaxkit.probes.calibration import ece
from jaxkit.probes.certificate import Best, Certificate, best_of, certificate
from jaxkit.probes.connectivity import Connectivity, lmc
from jaxkit.probes.relative import relative
from jaxkit.probes.similarity import cka
from jaxkit.probes.sparsity import feature_sparsity, gradient_rank

__all__ = [
    "Best",
    "Certificate",
    "Connectivity",
    "best_of",
    "certificate",
    "cka",
    "ece",
    "feature_sparsity",
    "gradient_rank",
    "lmc",
    "relative",
]
