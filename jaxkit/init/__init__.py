"""Initializers of arrays and of whole trees."""

from jaxkit.init.rules import Initializer, TreeInitializer, rules

__all__ = ["Initializer", "TreeInitializer", "rules"]
