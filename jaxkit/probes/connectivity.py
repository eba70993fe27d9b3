"""Linear mode connectivity: the error on the segment between two networks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxkit import tree

__all__ = ["Connectivity", "lmc"]


class Connectivity(NamedTuple):
    """The error along a segment, and how far its middle lies off the ends.

    Attributes:
      t: (points,) the places, from 0 (the first network) to 1.
      error: (points,) the error there.
      lmc: (error(0) + error(1)) / 2 - error(t*), with t* where the difference is largest in size:
        about 0 for connected networks, below 0 for a barrier, above 0 for a valley.
    """

    t: Float[Array, " points"]
    error: Float[Array, " points"]
    lmc: Float[Array, ""]


def lmc(
    error_fn: Callable[[PyTree], Float[Array, ""]],
    a: PyTree,
    b: PyTree,
    *,
    points: int = 11,
    prepare: Callable[[PyTree], PyTree] | None = None,
) -> Connectivity:
    """Measure linear mode connectivity: the error at (1 - t) a + t b for t from 0 to 1.

    Between sparse networks of different masks the segment is in neither of their supports but in
    the union of both.

    Args:
      error_fn: ``error_fn(params) -> scalar``, mapped over the points one after the other.
      a: a tree of params; leaves that are not inexact arrays stay those of a.
      b: another, like it.
      points: how many places, the ends among them.
      prepare: ``prepare(params) -> params`` at every point, ends included, before the error:
        with BatchNorm, recompute the running statistics of the training data, for those of the
        ends do not fit the middle.

    Raises:
      ValueError: trees that differ, or fewer than three points.

    References:
      J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, "Linear Mode Connectivity and the Lottery
      Ticket Hypothesis", arXiv:1912.05671; Y. Zhou, Y. Yang, A. Chang, M. W. Mahoney, "A
      Three-regime Model of Network Pruning", arXiv:2305.18383, whose sign this is.

    >>> found = lmc(lambda params: 1 - params["w"] ** 2, {"w": jnp.array(-1.0)},
    ...             {"w": jnp.array(1.0)}, points=5)
    >>> found.error.tolist(), found.lmc.item()
    ([0.0, 0.75, 1.0, 0.75, 0.0], -1.0)
    """
    tree.check_like(a, b, "second tree")
    if points < 3:
        raise ValueError(f"points={points}, and at least 3 were due: both ends and the middle")
    t = jnp.linspace(0, 1, points)

    def mix(t):
        between = lambda x, y: ((1 - t) * x + t * y).astype(x.dtype) if tree.is_inexact(x) else x
        return jax.tree.map(between, a, b)

    at = lambda t: error_fn(mix(t) if prepare is None else prepare(mix(t)))
    error = jax.lax.map(at, t)
    off = (error[0] + error[-1]) / 2 - error
    return Connectivity(t, error, off[jnp.argmax(jnp.abs(off))])
