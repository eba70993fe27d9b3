"""Probes: what networks have learned, and how they lie to each other."""

from jaxkit.probes.butterfly import Perturbed, perturb
from jaxkit.probes.calibration import ece
from jaxkit.probes.certificate import Best, Certificate, best_of, certificate
from jaxkit.probes.connectivity import Along, Connectivity, along, barrier, line, lmc
from jaxkit.probes.relative import relative
from jaxkit.probes.similarity import cka
from jaxkit.probes.sparsity import feature_sparsity, gradient_rank

__all__ = [
    "Along",
    "Best",
    "Certificate",
    "Connectivity",
    "Perturbed",
    "along",
    "barrier",
    "best_of",
    "certificate",
    "cka",
    "ece",
    "feature_sparsity",
    "gradient_rank",
    "line",
    "lmc",
    "perturb",
    "relative",
]
