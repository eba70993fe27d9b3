"""Random masks that lose no unit, and how wide a random sparse network has to be.

The recipe of "Why Random Pruning Is All We Need to Start Sparse": draw a random mask with the
ratios of `erk`, `pyramidal` or `balanced`, reconnect what it cut off (`connect`), initialize with
the live fan-in (`reinit` with ``live=True``), and let any method search inside it::

    scores = masks.random(key, params)
    source = masks.topk(scores, sparsity=masks.pyramidal(params, 0.9, order=order))
    source = masks.connect(key, source)
    mask = masks.topk(masks.magnitude(params), sparsity=0.99, within=source)

Growth stays inside if what is outside promises least: with ``growth = where(source, |g|, -1)``,
`regrow` finds as many entries inside as it drops, the dropped ones at least.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from jaxkit import tree
from jaxkit.masks.select import Mask

__all__ = ["connect", "er_width"]


def connect(
    key: PRNGKeyArray,
    mask: Mask,
    *,
    where: tree.Where = None,
    in_axis: int = -2,
    out_axis: int = -1,
    batch_axis: Sequence[int] = (),
) -> Mask:
    """Switch on one entry for every unit that a mask has cut off, on its side of the leaf.

    In each chosen leaf, an output unit without a live entry gets one, drawn uniformly from its
    column (all inputs, all taps of a convolution); then an input unit without one gets one from its
    row. So at most as many entries are added as there were empty rows and columns.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path alone.
      mask: a tree of bools.
      where: the leaves to connect; default: what is a weight by its path and dimensions.
      in_axis, out_axis: the axes of the units; the others are taps.
      batch_axis: axes along which the leaf is a stack of kernels (the layers of a scan).

    Returns:
      A mask that contains `mask`.

    Raises:
      ValueError: a `where` that matches nothing, or a chosen leaf without these axes.
      TypeError: a legacy uint32 key.

    Reference: A. Gadhikar, S. Mukherjee, R. Burkholz, "Why Random Pruning Is All We Need to Start
    Sparse", arXiv:2210.02412.

    >>> mask = {"kernel": jnp.array([[True, False], [True, False], [False, False]])}
    >>> connected = connect(jax.random.key(0), mask)["kernel"]
    >>> connected.any(0).all().item(), connected.any(1).all().item(), int(connected.sum()) <= 4
    (True, True, True)
    """
    keys = tree.keys(key, mask, "jaxkit.masks.connect")
    as_floats = jax.tree.map(  # `where` chooses floats
        lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32) if tree.is_array(m) else m, mask
    )

    def one(bit, path, m, k):
        if not bit or m.size == 0:
            return m
        due = {in_axis, out_axis, *batch_axis}
        if any(not -m.ndim <= axis < m.ndim for axis in due):
            raise ValueError(f"{path!r} has shape {m.shape}, without the axes {sorted(due)}")
        stack = [axis % m.ndim for axis in batch_axis]
        ends = [in_axis % m.ndim, out_axis % m.ndim]
        taps = [axis for axis in range(m.ndim) if axis not in (*stack, *ends)]
        order = [*stack, *taps, *ends]
        moved = m.transpose(order)
        sizes = [math.prod(m.shape[axis] for axis in axes) for axes in (stack, taps)]
        flat = moved.reshape(*sizes, *moved.shape[-2:])
        draws = jax.random.uniform(k, (2, *flat.shape))
        flat = jax.vmap(_reach, (0, 1))(flat, draws)
        return flat.reshape(moved.shape).transpose([order.index(axis) for axis in range(m.ndim)])

    return jax.tree.map(one, tree.select(as_floats, where), tree.paths(mask), mask, keys)


def _reach(
    mask: Bool[Array, "taps inputs outputs"], draws: Array
) -> Bool[Array, "taps inputs outputs"]:
    """Give every output one entry, then every input."""
    for draw, axis in zip(draws, (1, 2), strict=True):
        column = (0, axis)  # the taps, and the other side
        # of the largest, the first: draws of 23 bits may tie
        place = jax.lax.broadcasted_iota(jnp.int32, draw.shape, 0) * draw.shape[axis]
        place += jax.lax.broadcasted_iota(jnp.int32, draw.shape, axis)
        largest = jnp.where(draw == draw.max(column, keepdims=True), place, draw.size)
        first = place == largest.min(column, keepdims=True)
        mask = mask | (first & ~mask.any(column, keepdims=True))
    return mask


def er_width(sparsity: float, failure: float, *, edges: int = 1) -> int:
    """Return how many candidates a random sparse layer needs for each edge of a target network.

    All w candidates of an edge are absent with probability s^w, and one of k edges misses all of
    its own with probability k s^w at most: w = ceil(log(k / failure) / log(1 / s)). That is the
    factor 1 / log(1 / sparsity) by which a random network has to be wider than the target.

    Args:
      sparsity: s, in [0, 1).
      failure: the probability to miss, in (0, 1).
      edges: how many edges have to succeed together.

    Raises:
      ValueError: sparsity outside [0, 1), failure outside (0, 1), or edges < 1.

    Reference: A. Gadhikar, S. Mukherjee, R. Burkholz, "Why Random Pruning Is All We Need to Start
    Sparse", arXiv:2210.02412.

    >>> er_width(0.9, 0.01), er_width(0.9, 0.01, edges=1000)
    (44, 110)
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, and a number in [0, 1) is due")
    if not 0 < failure < 1 or edges < 1:
        raise ValueError(f"failure={failure} in (0, 1) and edges={edges} >= 1 are due")
    if sparsity == 0:
        return 1
    return max(1, math.ceil(math.log(edges / failure) / -math.log(sparsity) - 1e-12))
