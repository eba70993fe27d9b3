"""Representations that say where a latent lies among anchors, and not in which coordinates."""

import warnings

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit import tree

__all__ = ["relative"]


def relative(
    e: Float[Array, "*batch dim"],
    anchors: Float[Array, "anchors dim"],
    *,
    metric: str = "cosine",
    eps: float = 1e-12,
) -> Float[Array, "*batch anchors"]:
    """Represent each latent by its similarities to the latents of the anchors.

    r_j = <e, a_j> / (max(|e|, eps) max(|a_j|, eps)), which no rotation, reflection or scaling of
    the latent space changes. So a head that was trained on r of one encoder can be put on r of
    another one that has seen the same data, if the anchors are the same examples. (A translation
    does change r.)

    Args:
      e: latents.
      anchors: latents of the anchors: examples drawn from the training data (not the test's), the
        same for all encoders, and encoded by the encoder and the params that gave `e`; anchors
        that another encoder or an earlier step has encoded mean nothing, and nobody can see it.
        Differentiate through both to train with them. With fewer anchors than dimensions, latents
        that differ off the span of the anchors become one; take at least as many as classes.
      metric: "cosine"; or "inner" for <e, a_j> / sqrt(dim), which scaling does change.
      eps: the least length that is divided by.

    Returns:
      In float32 or wider. The row of a latent without length (all of its ReLUs are dead) is 0,
      and its gradient too; where the values are known, a warning counts such rows.

    Raises:
      ValueError: latents of other dimensions, or a metric that there is not.

    Reference: L. Moschella, V. Maiorca, M. Fumero, A. Norelli, F. Locatello, E. Rodolà, "Relative
    representations enable zero-shot latent space communication", arXiv:2209.15430.

    >>> anchors = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    >>> [round(x, 4) for x in relative(jnp.array([0.0, 2.0]), anchors).tolist()]
    [0.0, 0.8]
    """
    if metric not in ("cosine", "inner"):
        raise ValueError(f"metric={metric!r}; 'cosine' or 'inner' was due")
    if jnp.ndim(anchors) != 2 or jnp.shape(e)[-1:] != jnp.shape(anchors)[-1:]:
        raise ValueError(
            f"latents (..., dim) and anchors (anchors, dim) of the same encoder are due, and "
            f"{jnp.shape(e)} and {jnp.shape(anchors)} came"
        )
    e, anchors = tree.float32(jnp.asarray(e)), tree.float32(jnp.asarray(anchors))
    if metric == "inner":
        return jnp.matmul(e, anchors.T, precision="highest") / e.shape[-1] ** 0.5
    return jnp.matmul(
        _directions(e, eps, "latents"), _directions(anchors, eps, "anchors").T, precision="highest"
    )


def _directions(x: Array, eps: float, what: str) -> Array:
    square = jnp.sum(x * x, -1, keepdims=True)
    none = square == 0
    if tree.concrete(none) and none.any():
        warnings.warn(
            f"{int(none.sum())} of {none.size} {what} have length 0, and similarity 0 to all",
            stacklevel=3,
        )
    length = jnp.sqrt(jnp.where(none, 1, square))  # where: the gradient of sqrt at 0 is infinite
    return jnp.where(none, 0, x / jnp.maximum(length, eps))
