"""Perplexity: how surprised a reference model is by each example, and the least surprising ones."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal

__all__ = ["perplexity", "perplexity_filter"]


def perplexity(
    nll: Float[Array, "*examples tokens"], mask: Bool[Array, "*examples tokens"]
) -> Float[Array, "*examples"]:
    """Return exp(sum_t m_t nll_t / sum_t m_t) of each example: the geometric mean of 1 / p(token).

    A mean and not a sum, which would prefer short answers. It is V for a model that knows nothing
    of V tokens, and 1 for one that knows all. ``optax.softmax_cross_entropy_with_integer_labels``
    gives the nll; the reference model must not have been trained on what it judges.

    Args:
      nll: the negative log-likelihood of each token, in nats.
      mask: the tokens that count: those of the answer, neither the prompt's nor padding.

    Returns:
      Perplexities, in float32 or wider: inf for an example without any token.

    Raises:
      ValueError: another shape of the mask.
      TypeError: a mask that is not boolean.

    Reference: Y. Liu, Z. Zhao, Z. Zhuang, L. Tian, X. Zhou, J. Zhou, "POINTS: Improving Your
    Vision-language Model with Affordable Strategies", arXiv:2409.04828.

    >>> nll = jnp.log(jnp.array([[2.0, 8.0, 100.0]]))
    >>> perplexity(nll, jnp.array([[True, True, False]])).round(4).tolist()
    [4.0]
    """
    if jnp.shape(mask) != jnp.shape(nll):
        raise ValueError(f"mask is {jnp.shape(mask)}, and nll is {jnp.shape(nll)}")
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"mask is {jnp.result_type(mask)}, and bool was due")
    count = jnp.sum(mask, -1)
    total = jnp.where(mask, tree.float32(jnp.asarray(nll)), 0).sum(-1)
    return jnp.where(count > 0, jnp.exp(total / jnp.maximum(count, 1)), jnp.inf)


def perplexity_filter(
    perplexities: Float[Array, " examples"], fraction: float | Array = 0.2
) -> Bool[Array, " examples"]:
    """Mark the examples to train on: the floor(fraction n) of the lowest perplexity.

    Of equal examples the first. It neither sorts nor gathers (see `jaxkit.tree.topk`).

    Args:
      perplexities: of n examples, or the means of their nll, which rank alike.
      fraction: in [0, 1]; the paper keeps a fifth (one of five million). Exact for a Python number;
        it may be traced, and then counts in float32.

    Raises:
      ValueError: a fraction outside [0, 1], a perplexity that is NaN (under jit it ranks last), or
        another number of dimensions.

    Reference: as for `perplexity`.

    >>> perplexity_filter(jnp.array([3.0, 1.0, 2.0, 1.0, 9.0]), 0.4).tolist()
    [False, True, False, True, False]
    """
    if jnp.ndim(perplexities) != 1:
        raise ValueError(f"one perplexity an example was due, and {jnp.shape(perplexities)} came")
    if violates(lambda f: (f >= 0) & (f <= 1), fraction):
        raise ValueError(f"fraction={fraction}, and a number in [0, 1] was due")
    n = len(perplexities)
    if isinstance(fraction, int | float | np.number):
        keep = math.floor(decimal(fraction) * n)
    else:
        keep = jnp.floor(jnp.asarray(fraction, jnp.float32) * n)
    scores = {"perplexities": -jnp.asarray(perplexities)}
    return tree.topk(scores, keep, where="**")["perplexities"]
