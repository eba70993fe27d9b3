"""How simple a network has become: its distinct features, and the rank of its gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxkit import tree

__all__ = ["feature_sparsity", "gradient_rank"]


def feature_sparsity(
    features: Float[Array | np.ndarray, "n *units"], *, correlation: float | Array = 0.95
) -> Float[Array, ""]:
    """Return the share of zeros among the ReLU features of n examples, copies counted as zeros.

    Units that are correlated by more than `correlation` in size over the examples do the work of
    one: a unit with such a partner after it does not count. (The paper's coefficient is the share
    of what is left, 1 minus this.)

    Args:
      features: activations of n examples, positive where a unit is active; further dimensions
        count as units. All pairs are correlated: choose a thousand or so of more.
      correlation: in size, above which two units are one; 2 for never.

    Raises:
      ValueError: fewer than two examples.

    Reference: M. Andriushchenko, A. Varre, L. Pillaud-Vivien, N. Flammarion, "SGD with Large Step
    Sizes Learns Sparse Features", arXiv:2210.05337.

    >>> x = jnp.array([[1.0, 2.0, 0.0, 0.0], [3.0, 6.0, 1.0, 0.0]])  # the second doubles the first
    >>> feature_sparsity(x[:, [0, 1, 3, 3]]).item(), feature_sparsity(x[:, 2:]).item()
    (0.75, 0.75)
    """
    if np.ndim(features) < 1 or np.shape(features)[0] < 2:
        raise ValueError(f"features of two or more examples were due; {np.shape(features)} came")
    x = tree.float32(jnp.asarray(features)).reshape(np.shape(features)[0], -1)
    centered = x - x.mean(0)
    length = jnp.linalg.norm(centered, axis=0)
    moves = length > 1e-6 * jnp.max(jnp.abs(x), axis=0)  # a constant unit is like no other
    unit = jnp.where(moves, centered / jnp.where(moves, length, 1), 0)
    later = jnp.triu(jnp.abs(unit.T @ unit) > correlation, 1)
    alone = ~jnp.any(later, axis=1)
    return 1 - jnp.mean((x > 0) & alone)


def gradient_rank(
    apply_fn: Callable[..., Float[Array, "..."]],
    params: PyTree,
    *args: Any,
    where: tree.Where = "**",
    tolerance: float | Array = 1e-4,
) -> Int[Array, ""]:
    """Return the rank of the matrix of gradients of all outputs: how many directions fit the data.

    The number of singular values above `tolerance` times the largest one of the Jacobian
    d outputs / d params, with a row for each output of each example. (So many numbers are held:
    the size of the outputs times that of the params.)

    Args:
      apply_fn: ``apply_fn(params, *args)`` -> one array.
      params: any tree.
      where: the leaves to differentiate by; default: every float leaf.
      tolerance: in float32 not much below 1e-5.

    Reference: as for `feature_sparsity`.

    >>> net = lambda p, x: x @ (p["u"] * p["v"])
    >>> params = {"u": jnp.array([1.0, 1.0, 0.0]), "v": jnp.array([2.0, 0.0, 0.0])}
    >>> gradient_rank(net, params, jnp.eye(3)).item()  # nothing moves the third
    2
    """
    flat, unravel = tree.ravel(params, where)
    jacobian = jax.jacrev(lambda w: tree.float32(jnp.ravel(apply_fn(unravel(w), *args))))(flat)
    values = jnp.linalg.svd(tree.float32(jacobian), compute_uv=False)
    return jnp.sum(values > tolerance * jnp.max(values, initial=0.0))
