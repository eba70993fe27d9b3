"""Learned thresholds: how sparse each leaf is, found by the gradient."""

import jax
import jax.numpy as jnp

from jaxkit import tree
from jaxkit.reparam.core import Reparam, leafwise

__all__ = ["soft_threshold"]


def soft_threshold(*, initial: float = -5.0, where: tree.Where = None) -> Reparam:
    """STR: w = sign(v) relu(|v| - sigmoid(s)), with one trained threshold s for every leaf.

    theta holds {"value": v, "threshold": s} a leaf, v from the params. Weight decay on s raises the
    threshold, and so the sparsity, which nothing else sets: read it off the result. An entry at
    zero has no gradient, but returns when its threshold falls.

    Args:
      initial: s at the start; sigmoid(-5) = 0.0067. So apply(init) is not the params themselves,
        but within that of them.
      where: the leaves with a threshold; default: the weights.

    Raises:
      ValueError: a `where` that matches nothing.
      TypeError: a legacy uint32 key.

    Reference: A. Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable
    Sparsity", arXiv:2002.03231 (g = sigmoid).

    >>> r = soft_threshold(initial=0.0)
    >>> params = {"w": jnp.array([[0.75, -0.25, -1.0]])}
    >>> r.apply(r.init(jax.random.key(0), params), params)["w"].tolist()
    [[0.25, -0.0, -0.5]]
    """

    def init(key, path, w):
        return {"value": tree.float32(w), "threshold": jnp.full((), initial, jnp.float32)}

    def apply(piece, w):
        v = piece["value"]
        return jnp.sign(v) * jax.nn.relu(jnp.abs(v) - jax.nn.sigmoid(piece["threshold"]))

    return leafwise(init, apply, where=where, tag="jaxkit.reparam.soft_threshold")
