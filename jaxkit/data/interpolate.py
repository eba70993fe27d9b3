"""Networks that fit any labels by construction, without training."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, PRNGKeyArray, Real

from jaxkit import tree

__all__ = ["TwoLayer", "evaluate", "two_layer"]


class TwoLayer(NamedTuple):
    """The 2n + d weights of ``c(x) = sum_j w_j max(<a, x> - b_j, 0)``."""

    a: Float64[np.ndarray, " d"]
    b: Float64[np.ndarray, " n"]
    w: Float64[np.ndarray, " n"]


def two_layer(key: PRNGKeyArray, x: Real[np.ndarray, "n d"], y: Real[np.ndarray, " n"]) -> TwoLayer:
    """Build a two-layer ReLU network with 2n + d weights that fits n examples exactly.

    Every example is projected on one direction, ``z_i = <a, x_i>``, and the examples are put in
    the order of z. With ``b_1 = z_1 - 1`` and ``b_j = z_(j-1)`` the matrix
    ``A_ij = max(z_i - b_j, 0)`` is lower triangular with a positive diagonal, so ``A w = y`` has
    one solution: ``w_1 = y_1``, and after it the changes of slope of the piecewise-linear function
    through the points (z_i, y_i). So ``c(x_i) = y_i`` for every i, whatever the labels are.

    The direction is the one, among 100 Gaussian draws, whose projections are farthest apart:
    the slopes are the inverse gaps, and they cost digits. The construction reads values and runs
    on the host in float64; it is not for use under jit.

    Args:
      key: a typed key.
      x: n different examples of d features.
      y: n labels, of any real values.

    Returns:
      The weights: the direction a of (d,), the thresholds b of (n,), and the output weights w of
      (n,), the last two in the order of the projections. `evaluate` computes the network.

    Raises:
      ValueError: shapes that differ, values that are not finite, or equal examples (named).
      TypeError: a key that is not one typed key, or traced arrays.

    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> y = np.random.default_rng(1).integers(0, 10, 50)
    >>> net = two_layer(jax.random.key(0), x, y)
    >>> bool(np.abs(evaluate(net, x) - y).max() < 1e-9), sum(part.size for part in net)
    (True, 103)

    Reference: Chiyuan Zhang, Samy Bengio, Moritz Hardt, Benjamin Recht, Oriol Vinyals,
    "Understanding deep learning requires rethinking generalization", Theorem 1,
    arXiv 1611.03530. The paper leaves the choice of a and b open.
    """
    if not tree.concrete(x, y):
        raise TypeError("two_layer reads the values of x and y: call it outside jit")
    tree.check_key(key)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.shape[0]:
        raise ValueError(
            f"x of shape (n, d) and y of shape (n,) are due, n > 0; x{x.shape} and y{y.shape} came"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x and y hold values that are not finite")
    draws = np.asarray(jax.random.normal(key, (100, x.shape[1])), np.float64)
    projections = np.sort(x @ draws.T, axis=0)
    gaps = np.diff(projections, axis=0).min(0, initial=np.inf)
    a = draws[int(np.argmax(gaps))]
    z = x @ a
    order = np.argsort(z, kind="stable")
    gap = np.diff(z[order])
    if not (gap > 0).all():
        first = int(np.argmin(gap))
        i, j = sorted(order[first : first + 2].tolist())
        raise ValueError(f"examples {i} and {j} are equal (to float64): no function fits both")
    slope = np.diff(y[order]) / gap
    b = np.concatenate([z[order[:1]] - 1, z[order[:-1]]])
    w = np.diff(np.concatenate([[0.0], y[order[:1]], slope]))
    return TwoLayer(a, b, w)


def evaluate(net: TwoLayer, x: Real[np.ndarray, "m d"]) -> Float64[np.ndarray, " m"]:
    """Compute ``c(x) = sum_j w_j max(<a, x> - b_j, 0)`` for each row of `x`, in float64.

    Raises:
      ValueError: rows of another length than the direction.

    >>> net = TwoLayer(np.array([1.0]), np.array([0.0, 1.0]), np.array([1.0, -1.0]))
    >>> evaluate(net, np.array([[-1.0], [0.5], [3.0]])).tolist()
    [0.0, 0.5, 1.0]
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != net.a.size:
        raise ValueError(f"x of shape (m, {net.a.size}) is due, and x{x.shape} came")
    return np.maximum((x @ net.a)[:, None] - net.b, 0) @ net.w
