"""Scores: how much each entry is worth keeping. A tree like params, float32, larger = keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree

__all__ = ["magnitude", "random", "snip"]


def _scores(fn: Callable[..., Array], params: PyTree, *rest: PyTree) -> PyTree:
    """Map ``fn(leaf, *rest)`` over all inexact leaves, whatever their name or shape."""
    every = jax.tree.map(lambda _: True, params)
    return tree.map(lambda path, leaf, *others: fn(leaf, *others), params, *rest, where=every)


def _float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def magnitude(params: PyTree) -> PyTree:
    """Score every entry by its magnitude: s = |w|.

    Args:
      params: any tree; leaves that are not inexact arrays pass through.

    Returns:
      A tree like params of float32 (float64 for float64 leaves).

    Reference: S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for
    Efficient Neural Networks", arXiv:1506.02626.

    >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[2.0, 1.0]]
    """
    return _scores(lambda w: _float32(jnp.abs(w)), params)


def random(key: PRNGKeyArray, params: PyTree) -> PyTree:
    """Score every entry by an independent draw: s ~ U[0, 1), so that any top k is a random mask.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path alone.
      params: any tree; leaves that are not inexact arrays pass through.

    Returns:
      A tree like params of float32.

    Raises:
      TypeError: a legacy uint32 key.

    >>> scores = random(jax.random.key(0), {"kernel": jnp.ones((2, 3))})
    >>> scores["kernel"].shape
    (2, 3)
    """
    keys = tree.keys(key, params, "jaxkit.masks.random")
    return _scores(lambda w, k: jax.random.uniform(k, w.shape), params, keys)


def snip(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    *,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> PyTree:
    """Score every entry by its connection sensitivity: s = |w dL/dw|, one backward pass.

    It is the first-order effect on the loss of removing the entry. The paper divides by the sum of
    all scores, which changes no ranking.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``; model state and rngs travel in `batch`.
      params: any tree; leaves that are not inexact arrays pass through.
      batch: one batch; take one that holds several examples of every class.
      has_aux: loss_fn returns ``(loss, aux)``.
      axis_name: average the gradient over this axis of pmap or shard_map.

    Returns:
      A tree like params of float32.

    Reference: N. Lee, T. Ajanthan, P. Torr, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity", arXiv:1810.02340.

    >>> loss = lambda params, x: jnp.sum(params["kernel"] * x)
    >>> snip(loss, {"kernel": jnp.array([[3.0, -1.0]])}, jnp.array([1.0, 2.0]))["kernel"].tolist()
    [[3.0, 2.0]]
    """
    leaves, structure = jax.tree.flatten(params)
    floats = [x if tree.is_inexact(x) else None for x in leaves]

    def loss(floats):
        both = zip(floats, leaves, strict=True)
        full = [leaf if x is None else x for x, leaf in both]
        return loss_fn(jax.tree.unflatten(structure, full), batch)

    grads = jax.grad(loss, has_aux=has_aux)(floats)
    grads = grads[0] if has_aux else grads
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    pairs = zip(leaves, grads, strict=True)
    scores = [w if g is None else jnp.abs(_float32(w) * _float32(g)) for w, g in pairs]
    return jax.tree.unflatten(structure, scores)
