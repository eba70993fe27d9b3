"""Penalties on logits."""

import jax
from jaxtyping import Array, Float, Inexact

from jaxkit import tree

__all__ = ["z_loss"]


def z_loss(
    logits: Inexact[Array, "... classes"], *, scale: float | Array = 1e-4
) -> Float[Array, "..."]:
    """Return scale * logsumexp(logits)^2 of each token, in float32 or wider.

    Its gradient is 2 scale logsumexp softmax(logits). The cross entropy does not change when all
    logits of a token are shifted; this term holds the shift at 0, so that logits do not drift away
    over a long training. Add its mean over the tokens that count (not over padding) to the loss.

    Args:
      logits: of the classes along the last axis.
      scale: 1e-4 in the paper.

    Reference: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", arXiv:2309.14322.

    >>> import jax.numpy as jnp
    >>> round(z_loss(jnp.zeros(8), scale=1.0).item(), 4)  # (log 8)^2
    4.3241
    """
    return scale * jax.nn.logsumexp(tree.float32(logits), axis=-1) ** 2
