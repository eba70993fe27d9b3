"""What becomes of frozen weights that a learned mask leaves out: recycled, or drawn anew."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal
from jaxkit.init.rules import TreeInitializer
from jaxkit.masks.select import Mask
from jaxkit.reparam.core import Theta, install, matched

__all__ = ["iterand", "recycle"]


def recycle(
    params: PyTree, theta: Theta, fraction: float | Array = 0.2, *, mask: Mask | None = None
) -> PyTree:
    """Copy the weights with the largest scores over those with the smallest.

    In each leaf, with q = floor(fraction n) and the entries in ascending order of |s| (ties in the
    order of the flat index): the j-th of the first q takes the weight of the j-th of the last q.
    The scores stay. As long as q entries are masked, no weight in use changes, and what the model
    computes stays what it is; but scores that rise later bring better weights with them. The paper
    recycles every few epochs; how often and how much is not known, and 0.2 is our choice.

    Args:
      params: the weights; those without scores stay as they are.
      theta: scores by path, of `edge_popup`, `biprop` or any `supermask`.
      fraction: in [0, 1/2]; it may be traced, and is then rounded to float32.
      mask: the mask in force (`learned_mask`). With it, and if its values are known, it is an error
        to copy over an entry in use.

    Raises:
      ValueError: a fraction outside [0, 1/2], where the ranges would overlap; an entry in use.

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
        order = jnp.argsort(jnp.abs(theta[path]).ravel())
        place = jnp.arange(n)
        if used is not None and tree.concrete(used[path], order, q):
            lost = int((used[path].ravel()[order] & (place < q)).sum())
            if lost:
                raise ValueError(
                    f"{path!r}: {lost} of the {int(q)} entries to copy over are in use; only "
                    f"{int((~used[path]).sum())} are masked"
                )
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
