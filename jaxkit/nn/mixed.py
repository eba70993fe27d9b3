"""Mixtures of operations whose weights are searched for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["max_w"]


def max_w(
    logits: Float[Array, "... choices"], *, stop_gradient: bool = False
) -> Float[Array, "... choices"]:
    """Return Max-W's coefficients of a mixture of operations, 1 - max_j w_j + w_i, w the softmax.

    ``jnp.tensordot(max_w(logits), outputs, 1)`` in place of ``jax.nn.softmax(logits)``: the best
    operation so far has the coefficient 1, as it will have when it is alone, and the others what
    they are behind it, less. Equal weights give the plain sum, a single one that operation alone.

    Args:
      logits: one for each choice, along the last axis; of any grid of hyperparameters too.
      stop_gradient: take the largest weight as a constant. In the authors' code it is none (False
        here): then the coefficient of the best operation has no gradient, and the terms of all
        the others pull at its weight.

    Reference: A. Hundt, V. Jain, G. D. Hager, "sharpDARTS: Faster and More Accurate Differentiable
    Architecture Search", arXiv:1903.09900.

    >>> max_w(jnp.log(jnp.array([2.0, 1.0, 1.0]))).tolist()
    [1.0, 0.75, 0.75]
    """
    w = jax.nn.softmax(logits, axis=-1)
    best = jnp.max(w, axis=-1, keepdims=True)
    return 1 - (jax.lax.stop_gradient(best) if stop_gradient else best) + w
