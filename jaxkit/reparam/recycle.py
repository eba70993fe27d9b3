"""What becomes of frozen weights that a learned mask leaves out: recycled, or drawn anew."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal
from jaxkit.init.rules import TreeInitializer
from jaxkit.masks.select import Mask
from jaxkit.reparam.core import Theta, install, matched

__all__ = ["iterand", "recycle"]


def recycle(
    params: PyTree,
    theta: Theta,
    fraction: float | Array = 0.2,
    *,
    soft: Callable[[Array], Array] = jnp.abs,
    mask: Mask | None = None,
) -> PyTree:
    """Copy the weights with the largest scores over those with the smallest.

    In each leaf, with q = floor(fraction n) and the entries in ascending order of soft(s), what the
    mask ranks (ties in the order of the flat index): the j-th of the first q takes the weight of
    the j-th of the last q. The scores stay. As long as q entries are masked, no weight in use
    changes, and what the model computes stays what it is; but scores that rise later bring better
    weights with them. The paper recycles every few epochs; how often and how much is not known, and
    0.2 is our choice.

    The default ranks as `edge_popup`, `signed_supermask` and `biprop` of a sparsity do. Without a
    sparsity `biprop` masks by s > 0, where a weight of a small score is in use::

        params = recycle(params, theta, soft=lambda s: s, mask=learned_mask(r, theta, params))

    (The authors' code ranks by |s| there too, and so changes weights in use.)

    Args:
      params: the weights; those without scores stay as they are.
      theta: scores by path, of `edge_popup`, `biprop` or any `supermask`.
      fraction: in [0, 1/2]; it may be traced, and is then rounded to float32.
      soft: what the mask ranks, as for `supermask`.
      mask: the mask in force (`learned_mask`). With it masked entries come before those in use,
        whatever their scores. More than there are can not be copied over: an error if its values
        are known, and under jit entries in use are overwritten.

    Raises:
      ValueError: a fraction outside [0, 1/2], where the ranges would overlap; a mask that leaves
        fewer than q entries out.

    Reference: M. Gorbett, D. Whitley, "Randomly Initialized Subnetworks with Iterative Weight
    Recycling", arXiv:2303.15953.

    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> theta = {"kernel": jnp.array([[0.1, -0.9], [0.5, 0.3]])}
    >>> recycle(params, theta, 0.25)["kernel"].tolist()
    [[2.0, 2.0], [3.0, 4.0]]
    """
    if violates(lambda q: (q >= 0) & (q <= 0.5), fraction):
        raise ValueError(
            f"fraction is {fraction}, and a share in [0, 1/2] was due: above it, the weights that "
            "are copied would be copied over"
        )
    used = None if mask is None else matched(mask, theta)
    out = {}
    for path, w in matched(params, theta).items():
        n = w.size
        q = _floor(fraction, n)
        live = jnp.zeros(w.shape, bool) if used is None else used[path]
        if violates(lambda live, q: q <= (~live).sum(), live, q):
            raise ValueError(
                f"{path!r}: {int(q)} entries were to be copied over, and only "
                f"{np.size(live) - np.sum(live)} are masked: the others are in use; lower fraction"
            )
        order = jnp.lexsort((soft(theta[path]).ravel(), live.ravel()))
        place = jnp.arange(n)
        source = order[jnp.where(place < q, place + n - q, place)]
        flat = w.ravel()
        out[path] = flat.at[order].set(flat[source]).reshape(w.shape)
    return install(params, out)


def _floor(fraction: Any, n: int) -> Any:
    """Return floor(fraction n), exactly for a Python number."""
    if isinstance(fraction, int | float):
        return math.floor(decimal(fraction) * n)
    return jnp.floor(jnp.float32(fraction) * n).astype(jnp.int32)


def iterand(
    key: PRNGKeyArray,
    init: TreeInitializer,
    params: PyTree,
    mask: Mask,
    rate: float | Array = 0.1,
) -> PyTree:
    """Draw masked weights anew, each with probability `rate`: w = where(mask or kept, w, fresh).

    Args:
      key: a typed key, another one each time.
      init: ``(key, params) -> params``, such as `init.rules`: what the weights were drawn by.
      params: the weights.
      mask: the mask in force (`learned_mask`); where it is True nothing changes.
      rate: the probability, in [0, 1].

    Raises:
      ValueError: a rate outside [0, 1], or a mask that does not fit.
      TypeError: a legacy uint32 key.

    Reference: D. Chijiwa, S. Yamaguchi, Y. Ida, K. Umakoshi, T. Inoue, "Pruning Randomly
    Initialized Neural Networks with Iterative Randomization", arXiv:2106.09269.

    >>> params, mask = {"kernel": jnp.ones((1, 2))}, {"kernel": jnp.array([[True, False]])}
    >>> zeros = lambda key, params: jax.tree.map(jnp.zeros_like, params)
    >>> iterand(jax.random.key(0), zeros, params, mask, 1.0)["kernel"].tolist()
    [[1.0, 0.0]]
    """
    if violates(lambda r: (r >= 0) & (r <= 1), rate):
        raise ValueError(f"rate is {rate}, and a probability was due")
    tree.check_like(params, mask, "mask")
    keys = tree.keys(key, params, "jaxkit.reparam.iterand")

    def redraw(w: Any, m: Any, fresh: Any, k: Any) -> Any:
        if not tree.is_inexact(w):
            return w
        return jnp.where(m | ~jax.random.bernoulli(k, rate, w.shape), w, fresh)

    return jax.tree.map(redraw, params, mask, init(key, params), keys)
