"""Which runs to go on with, and in which order the data come."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jaxkit import tree
from jaxkit._rank import decimal

__all__ = ["phased", "stacked", "successive_keep"]


def successive_keep(
    losses: Float[np.ndarray, "runs steps"],
    gradient_norms: Float[np.ndarray, "runs steps"],
    *,
    share: float = 0.5,
) -> Bool[np.ndarray, " runs"]:
    """Mark the fine-tuning runs to go on with, after a fifth of their steps, say.

    Runs with a higher early training loss and lower gradient norms were found to end better in
    supervised fine-tuning of language models: those with the largest z(mean loss) - z(mean log
    gradient norm) stay, z the score over the runs. Ties keep the lower norm. A run that diverged
    (NaN, inf) never stays, and does not count in z. (A rule of ours; the sign is a finding about
    language models and is not to be expected elsewhere.)

    Args:
      losses, gradient_norms: of a window of steps of each run; norms before clipping and, if the
        runs have other batch sizes, times sqrt(batch).
      share: of the runs that stay, rounded up.

    Raises:
      ValueError: arrays of other shapes, no run of finite numbers, norms not above 0, or a share
        outside (0, 1].

    Reference: A. Pareja et al., "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning
    Small LLMs", arXiv:2412.13337.

    >>> losses, norms = np.array([[1.0], [2.0]]), np.array([[9.0], [3.0]])
    >>> successive_keep(losses, norms).tolist()
    [False, True]
    """
    loss, norm = np.asarray(losses, np.float64), np.asarray(gradient_norms, np.float64)
    if not 0 < share <= 1:
        raise ValueError(f"share={share}, and a number in (0, 1] was due")
    same = loss.shape == norm.shape and loss.ndim == 2
    fine = np.flatnonzero(np.isfinite(loss + norm).all(1)) if same else []
    if not len(fine) or np.any(norm <= 0):
        raise ValueError(
            "finite losses and positive gradient norms are due, as (runs, steps); came "
            f"{loss.shape} and {norm.shape}"
        )
    size = np.log(norm[fine]).mean(1)
    score = _z(loss[fine].mean(1)) - _z(size)
    order = np.lexsort((size, -np.round(score, 12)))
    keep = np.zeros(len(loss), bool)
    keep[fine[order[: math.ceil(decimal(share) * len(loss))]]] = True
    return keep


def _z(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / (x.std() or 1.0)


def stacked(key: PRNGKeyArray, sizes: Sequence[int]) -> Int[np.ndarray, "total 2"]:
    """Return one epoch of all data sets shuffled together: rows of (data set, index).

    >>> order = stacked(jax.random.key(0), [2, 3])
    >>> sorted(map(tuple, order.tolist()))
    [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    """
    tree.check_key(key)
    rows = np.array([(d, i) for d, n in enumerate(sizes) for i in range(n)], int).reshape(-1, 2)
    return rows[np.asarray(jax.random.permutation(key, len(rows)))]


def phased(key: PRNGKeyArray, sizes: Sequence[int]) -> Int[np.ndarray, "total 2"]:
    """Return one epoch in phases: each data set shuffled, one after the other.

    Reference: as for `successive_keep`, which finds `stacked` to need fewer samples.

    >>> phased(jax.random.key(0), [2, 3])[:, 0].tolist()
    [0, 0, 1, 1, 1]
    """
    tree.check_key(key)
    parts = []
    for d, n in enumerate(sizes):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, d), n))
        parts.append(np.stack([np.full(n, d), order], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), int)
