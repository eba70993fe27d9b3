"""Reparametrizations: theta in, params out; what is trained is theta."""

from jaxkit.reparam.core import Reparam, Theta, install, leafwise, matched

__all__ = [
    "Reparam",
    "Theta",
    "install",
    "leafwise",
    "matched",
]
