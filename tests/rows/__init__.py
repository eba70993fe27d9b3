"""The contract's table: every module here brings some of ROWS, OPTIMIZERS and EXEMPT."""

from importlib import import_module
from pkgutil import iter_modules

_MODULES = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]

ROWS = [row for module in _MODULES for row in getattr(module, "ROWS", [])]
OPTIMIZERS = [row for module in _MODULES for row in getattr(module, "OPTIMIZERS", [])]
EXEMPT = {name: why for module in _MODULES for name, why in getattr(module, "EXEMPT", {}).items()}
