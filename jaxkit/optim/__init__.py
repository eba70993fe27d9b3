"""Gradient transformations, schedules and laws that optax lacks."""

from jaxkit.optim.basis import Basis, BasisState, in_basis
from jaxkit.optim.fira import fira, galore
from jaxkit.optim.soap import scale_by_soap, soap

__all__ = ["Basis", "BasisState", "fira", "galore", "in_basis", "scale_by_soap", "soap"]
