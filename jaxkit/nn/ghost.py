"""Ghost batch normalization: the statistics of small batches in a large one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit import tree

__all__ = ["GhostStats", "ghost_batch_norm"]


class GhostStats(NamedTuple):
    """Running statistics, by feature."""

    mean: Float[Array, " features"]
    var: Float[Array, " features"]


def ghost_batch_norm(
    x: Float[Array, "batch *positions features"],
    stats: GhostStats | None = None,
    *,
    size: int = 128,
    momentum: float | Array = 0.9,
    epsilon: float | Array = 1e-5,
) -> tuple[Float[Array, "batch *positions features"], GhostStats]:
    """Normalize each ghost batch by its own statistics; the running ones see them in order.

    y = (x - mean_i) / sqrt(var_i + epsilon) for ghost i, ``size`` neighbours along the batch, over
    examples and positions (variance over n, not n - 1). Then for i = 1, ..., k:
    running <- momentum running + (1 - momentum) mean_i, and so for the variance; that is
    m^k running + (1 - m) sum_i m^(k - i) mean_i. Scale and shift come after it. Predict with the
    running statistics: ``(x - stats.mean) / sqrt(stats.var + epsilon)``.

    The rest of the large-batch recipe: multiply the learning rate by sqrt(large / small), clip the
    averaged gradient, and keep the number of updates: ``optax`` schedules with their boundaries
    times ceil(large / small). A BatchNorm that is synchronized over devices undoes ghosts.

    Args:
      x: a batch.
      stats: the running statistics so far; default: mean 0, variance 1.
      size: of a ghost, which has to divide the batch.
      momentum: the share of the running statistics that stays.
      epsilon: added to variances.

    Returns:
      y in the dtype of x, and the new running statistics in float32.

    Raises:
      ValueError: a batch that the size does not divide.

    Reference: E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", arXiv:1705.08741.

    >>> y, stats = ghost_batch_norm(jnp.array([[1.0], [3.0], [10.0], [30.0]]), size=2)
    >>> y.ravel().round(3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    >>> round(stats.mean.item(), 4)  # (0.9 * 0 + 0.1 * 2) * 0.9 + 0.1 * 20
    2.18
    """
    n = x.shape[0]
    if size < 1 or n % size:
        raise ValueError(f"a batch of {n} is not a number of ghosts of {size}")
    if stats is None:
        stats = GhostStats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    ghosts = tree.float32(x).reshape(n // size, size, *x.shape[1:])
    over = tuple(range(1, ghosts.ndim - 1))
    mean = ghosts.mean(over, keepdims=True)
    var = ghosts.var(over, keepdims=True)
    y = (ghosts - mean) * jax.lax.rsqrt(var + epsilon)

    def follow(running: GhostStats, each: GhostStats) -> tuple[GhostStats, None]:
        mix = lambda old, new: momentum * old + (1 - momentum) * new
        return jax.tree.map(mix, running, each), None

    flat = lambda v: v.reshape(len(v), v.shape[-1])
    start = jax.tree.map(tree.float32, stats)
    stats, _ = jax.lax.scan(follow, start, GhostStats(flat(mean), flat(var)))
    return y.reshape(x.shape).astype(x.dtype), stats
