"""Leaves by path: name them, choose them, give them keys, rank their entries.

A leaf's *path* is its key path joined by ``/``: ``params/Dense_0/kernel``. The same three forms
of `where` choose leaves everywhere in jaxkit:

* a glob over the path: ``*`` stays within one component, ``**`` spans any number of them, and a
  sequence of globs chooses what any of them matches;
* a callable ``(path, leaf) -> bool``;
* a tree of bools with the structure of the tree it chooses from;

and ``None``, the default, stands for `is_weight`: two or more dimensions and no bias, scale, norm
or embedding by name. Only inexact arrays (float and complex) can be chosen; every other leaf
passes through every function untouched.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, PRNGKeyArray, PyTree

Where = str | Sequence[str] | Callable[[str, Any], bool] | PyTree | None

__all__ = [
    "Where",
    "check_key",
    "check_like",
    "flatten",
    "is_weight",
    "keys",
    "map",
    "paths",
    "quantile",
    "ravel",
    "select",
    "topk",
]


# ------------------------------------------------------------------------------------- paths


def _spell(key_path) -> str:
    parts = [jax.tree_util.keystr((k,), simple=True) for k in key_path]
    if len(parts) > 1 and parts[-1] == "value":
        last = key_path[-1]
        if isinstance(last, jax.tree_util.GetAttrKey):  # the array inside an NNX Variable
            parts.pop()
    return "/".join(parts)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, in leaf order.

    Raises:
      ValueError: two leaves have the same path (``{"a/b": x}`` beside ``{"a": {"b": y}}``).

    >>> list(flatten({"Dense_0": {"bias": 0.0, "kernel": 1.0}, "blocks": [2.0, 3.0]}))
    ['Dense_0/bias', 'Dense_0/kernel', 'blocks/0', 'blocks/1']
    """
    out: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = _spell(key_path)
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; rename one of them")
        out[path] = leaf
    return out


def paths(tree: PyTree) -> PyTree[str]:
    """Return the tree with every leaf replaced by its path.

    >>> paths({"a": {"w": 1.0}, "b": [2.0]})
    {'a': {'w': 'a/w'}, 'b': ['b/0']}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), list(flatten(tree)))
