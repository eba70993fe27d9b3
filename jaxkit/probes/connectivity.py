"""The straight line between two networks: the error on it, its barrier, and how far training is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["Along", "Connectivity", "along", "barrier", "line", "lmc"]


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


class Along(NamedTuple):
    """Where weights are, seen from the line through two networks.

    Attributes:
      alpha: how far along the line, in the unit of the weights: 0 at the first network.
      beta: how far off the line.
    """

    alpha: Float[Array, "..."]
    beta: Float[Array, "..."]


def line(
    error_fn: Callable[[PyTree], Float[Array, "..."]],
    a: PyTree,
    b: PyTree,
    t: Float[Array, " points"],
    *,
    prepare: Callable[[PyTree], PyTree] | None = None,
    batch_size: int | None = None,
) -> Float[Array, "points ..."]:
    """Return the error at (1 - t) a + t b, for every t.

    From the start of a training to its end, the loss of many networks falls all the way; a rise
    beyond t = 1 shows how wide the solution is. The error of a model with BatchNorm or dropout is
    meant as it predicts: noise of the loss would look like bumps.

    Args:
      error_fn: ``error_fn(params) -> array``: a loss, an error, or several.
      a: a tree of params; leaves that are not inexact arrays stay those of a.
      b: another, like it.
      t: places: 0 is a, 1 is b, exactly; any others, too.
      prepare: ``prepare(params) -> params`` at every point, ends included, before the error:
        with BatchNorm, recompute the running statistics of the training data, for those of the
        ends do not fit the middle.
      batch_size: how many points to compute at once; default: one after the other.

    Raises:
      ValueError: trees that differ, or t that is no vector.

    Reference: I. J. Goodfellow, O. Vinyals, A. M. Saxe, "Qualitatively characterizing neural
    network optimization problems", arXiv:1412.6544.

    >>> parabola = lambda params: params["w"] ** 2
    >>> line(parabola, {"w": jnp.array(2.0)}, {"w": jnp.array(0.0)}, jnp.array([0, 0.5, 1, 1.5]))
    Array([4., 1., 0., 1.], dtype=float32)
    """
    tree.check_like(a, b, "second tree")
    if jnp.ndim(t) != 1:
        raise ValueError(f"t has shape {jnp.shape(t)}, and a vector of places was due")

    def mix(t):
        between = lambda x, y: ((1 - t) * x + t * y).astype(x.dtype) if tree.is_inexact(x) else x
        return jax.tree.map(between, a, b)

    at = lambda t: error_fn(mix(t) if prepare is None else prepare(mix(t)))
    return jax.lax.map(at, jnp.asarray(t), batch_size=batch_size)


def barrier(
    error: Float[Array, " points"], t: Float[Array, " points"] | None = None, *, at: str = "gap"
) -> Float[Array, ""]:
    """Return how far a curve rises above the segment between its ends.

    The gap at t is error(t) - ((1 - t) error(0) + t error(1)).

    Args:
      error: the error along a line, ends included, as of `line`.
      t: its places from 0 to 1; default: evenly spaced.
      at: "gap", the largest gap (0 or more), or "peak", the gap where the error is highest.

    Raises:
      ValueError: another `at`, fewer than three points, places that do not go from 0 to 1.

    References: J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, "Linear Mode Connectivity and
    the Lottery Ticket Hypothesis", arXiv:1912.05671; G. S. Altintas, D. Kwok, C. Raffel, D.
    Rolnick, "The Butterfly Effect: Neural Network Training Trajectories Are Highly Sensitive to
    Initial Conditions", arXiv:2506.13234, whose code takes the peak.

    >>> barrier(jnp.array([0.0, 2.0, 1.0])), barrier(jnp.array([0.0, 2.0, 4.0, 5.0]), at="peak")
    (Array(1.5, dtype=float32), Array(0., dtype=float32))
    """
    if at not in ("gap", "peak"):
        raise ValueError(f"at={at!r}, and 'gap' or 'peak' was due")
    error = jnp.asarray(error)
    if error.ndim != 1 or len(error) < 3:
        raise ValueError(f"the error has shape {error.shape}: a curve of 3 or more points was due")
    t = jnp.linspace(0, 1, len(error)) if t is None else jnp.asarray(t)
    if violates(lambda t: (t[0] == 0) & (t[-1] == 1), t):
        raise ValueError(f"the places go from {t[0]} to {t[-1]}, and from 0 to 1 was due")
    gap = error - ((1 - t) * error[0] + t * error[-1])
    return gap.max() if at == "gap" else gap[jnp.argmax(error)]


def along(params: PyTree, a: PyTree, b: PyTree, *, where: tree.Where = "**") -> Along:
    """Return where weights lie with respect to the line from a to b.

    alpha = <params - a, u> and beta = |params - a - alpha u|, with u = (b - a) / |b - a|. Over the
    iterates of a training from a to b: how far it strays. vmap over a stack of them.

    Args:
      params: a tree of weights.
      a: the start of the line, a tree like it.
      b: its end.
      where: the leaves that count; default: every float leaf.

    Raises:
      ValueError: trees that differ, or (if the values are known) a line without length.

    Reference: I. J. Goodfellow, O. Vinyals, A. M. Saxe, arXiv:1412.6544.

    >>> at = lambda x, y: {"w": jnp.array([x, y])}
    >>> along(at(1.0, 2.0), at(0.0, 0.0), at(3.0, 0.0))
    Along(alpha=Array(1., dtype=float32), beta=Array(2., dtype=float32))
    """
    for other, what in ((a, "start of the line"), (b, "end of the line")):
        tree.check_like(params, other, what)
    p, x, y = (
        {k: tree.float32(jnp.asarray(v)) for k, v in tree.chosen(t, where).items()}
        for t in (params, a, b)
    )
    step, way = optax.tree.sub(p, x), optax.tree.sub(y, x)
    length = jnp.asarray(optax.tree.norm(way))
    if tree.concrete(length) and length == 0:
        raise ValueError("the line has no length: its ends are the same")
    alpha = jnp.asarray(optax.tree.sum(optax.tree.mul(step, way)) / length)
    off = jax.tree.map(lambda s, w: s - alpha / length * w, step, way)
    return Along(alpha, jnp.asarray(optax.tree.norm(off)))


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
      prepare: ``prepare(params) -> params`` at every point before the error, as of `line`.

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
    if points < 3:
        raise ValueError(f"points={points}, and at least 3 were due: both ends and the middle")
    t = jnp.linspace(0, 1, points)
    error = line(error_fn, a, b, t, prepare=prepare)
    off = (error[0] + error[-1]) / 2 - error
    return Connectivity(t, error, off[jnp.argmax(jnp.abs(off))])
