"""Time-to-result benchmarks: performance profiles and their score."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["TimeToResult", "algoperf", "calibrate_jointly", "reached"]


class TimeToResult(NamedTuple):
    """What `algoperf` finds.

    score: of each submission, in [0, 1].
    ratio: its time over the fastest one's, by workload; inf where it missed the target.
    """

    score: Float[np.ndarray, " submissions"]
    ratio: Float[np.ndarray, "submissions workloads"]

    def profile(self, tau: Float[np.ndarray, " t"]) -> Float[np.ndarray, "submissions t"]:
        """Return rho_s(tau): the share of workloads with a ratio of at most tau."""
        return np.mean(self.ratio[:, :, None] <= np.asarray(tau), axis=1)


def algoperf(
    times: Float[np.ndarray, "submissions workloads"], *, tau_max: float = 4.0
) -> TimeToResult:
    """Score submissions by the time that each takes to the target of every workload.

    r = time / fastest time of the workload, and score = 1 / (tau_max - 1) times the integral of
    the performance profile rho from 1 to tau_max, which is exactly the mean over the workloads of
    clip((tau_max - r) / (tau_max - 1), 0, 1). The fastest everywhere scores 1; a submission that
    never arrives scores 0. (The benchmark's code integrates by the trapezoidal rule on 100 points,
    which is biased a little where rho jumps.) Of several trials take the fastest by validation
    metric, and of several studies the median of their times.

    Args:
      times: to reach the target; inf where it was not reached.
      tau_max: where the profile ends.

    Raises:
      ValueError: a missing (NaN) or negative time, or tau_max not above 1.

    Reference: G. E. Dahl et al., "Benchmarking Neural Network Training Algorithms",
    arXiv:2306.07179.

    >>> found = algoperf([[10.0, 20.0], [20.0, np.inf]])
    >>> found.score.round(4).tolist(), found.ratio.tolist()
    ([1.0, 0.3333], [[1.0, 1.0], [2.0, inf]])
    """
    t = np.asarray(times, np.float64)
    if t.ndim != 2 or np.any(np.isnan(t)) or np.any(t < 0):
        raise ValueError(
            "times are due as (submissions, workloads), each at least 0, inf where the target was "
            f"missed; there is no score over fewer workloads; came {np.shape(times)}"
        )
    if not tau_max > 1:
        raise ValueError(f"tau_max={tau_max}, and a number above 1 was due")
    best = t.min(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(np.isfinite(t), np.where(t == best, 1.0, t / best), np.inf)
    share = np.clip((tau_max - ratio) / (tau_max - 1), 0, 1)
    return TimeToResult(share.mean(axis=1), ratio)


def reached(
    steps: Float[np.ndarray, " n"],
    metric: Float[np.ndarray, " n"],
    target: float,
    *,
    maximize: bool,
) -> float:
    """Return the first step at which a metric meets its target, inf if it never does.

    NaN meets no target. Whether larger is better is due in words: it cannot be guessed.

    Raises:
      ValueError: not as many steps as values of the metric.

    >>> reached([0, 10, 20], [0.3, 0.8, 0.9], 0.75, maximize=True)
    10.0
    """
    values = np.asarray(metric, np.float64)
    if np.shape(steps) != values.shape:
        raise ValueError(f"{np.shape(steps)} steps and {values.shape} values of the metric came")
    hit = values >= target if maximize else values <= target
    return float(np.asarray(steps)[np.argmax(hit)]) if hit.any() else np.inf


def calibrate_jointly(
    times: Float[np.ndarray, "configs workloads"], *, tau_max: float = 4.0
) -> int:
    """Return the one configuration for all workloads: the one with the largest `algoperf` score.

    Reference: P. Kasimbeg et al., "How far away are truly hyperparameter-free learning
    algorithms?", arXiv:2505.24005.

    >>> calibrate_jointly([[1.0, 9.0], [2.0, 2.0], [9.0, 1.0]])
    1
    """
    return int(np.argmax(algoperf(times, tau_max=tau_max).score))
