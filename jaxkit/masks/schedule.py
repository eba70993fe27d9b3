"""Schedules of sparsity over steps or rounds, and what they cost on the way.

A schedule is a function of the step, as in optax, whose ``polynomial_schedule(s_i, s_f, 3, length,
begin)`` is the cubic of gradual pruning and whose ``linear_schedule`` the straight line. Here are
those that it lacks, and the average parameter count.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit._known import violates
from jaxkit.masks.select import check_sparsity

__all__ = ["average_density", "compute_window", "exponential", "iterative"]

Schedule = Callable[[Any], Any]


def iterative(fraction: float | Array) -> Schedule:
    """Prune the same fraction of the live entries in every round: s_r = 1 - (1 - fraction)^r.

    Args:
      fraction: of the live entries, in (0, 1); 0.2 in the lottery-ticket papers.

    Returns:
      A schedule: round -> sparsity; round 0 is dense.

    Raises:
      ValueError: a fraction outside (0, 1).

    Reference: J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable
    Neural Networks", arXiv:1803.03635.

    >>> [round(float(iterative(0.2)(r)), 3) for r in range(4)]
    [0.0, 0.2, 0.36, 0.488]
    """
    if violates(lambda f: (f > 0) & (f < 1), fraction):
        raise ValueError(f"fraction is {fraction}, and a share in (0, 1) is due")
    return lambda step: 1 - jnp.asarray(1.0 - fraction) ** step


def exponential(sparsity: float | Array, rounds: int | Array) -> Schedule:
    """Reach a sparsity in equal ratios: s_i = 1 - (1 - sparsity)^((i + 1) / rounds).

    i = 0 is the first round that prunes, and from i = rounds - 1 on s_i = sparsity.

    Args:
      sparsity: the last one, in [0, 1).
      rounds: how many; 100 for SynFlow.

    Raises:
      ValueError: sparsity outside [0, 1), or fewer rounds than 1.

    Reference: H. Tanaka, D. Kunin, D. Yamins, S. Ganguli, "Pruning neural networks without any data
    by iteratively conserving synaptic flow", arXiv:2006.05467.

    >>> [round(float(exponential(0.75, 2)(i)), 3) for i in range(3)]
    [0.5, 0.75, 0.75]
    """
    check_sparsity(sparsity)
    if isinstance(rounds, int) and rounds < 1:
        raise ValueError(f"rounds is {rounds}, and 1 or more are due")
    return lambda step: 1 - jnp.asarray(1.0 - sparsity) ** jnp.minimum((step + 1) / rounds, 1.0)


def average_density(
    schedule: Schedule, steps: int, *, exempt: float | Array = 0.0
) -> Float[Array, ""]:
    """Return the average parameter count of a training run, as a share of the dense count.

    (1 / steps) sum_t [exempt + (1 - exempt) (1 - s_t)] over t = 0 ... steps - 1, with equally many
    tokens in every step. Times the dense count it is the average parameter count, and with C = 6 N
    D times the dense compute it is the compute of the run.

    Args:
      schedule: step -> sparsity of what is pruned.
      steps: of the whole run.
      exempt: the share of the counted parameters that is never pruned. Say which ones you count
        (with embeddings or without), and count the same in all runs.

    Reference: T. Jin et al., "The Journey Matters: Average Parameter Count over Pre-training
    Unifies Sparse and Dense Scaling Laws", arXiv:2501.12486.

    >>> round(float(average_density(lambda t: jnp.where(t < 50, 0.0, 0.5), 100)), 3)
    0.75
    """
    density = 1 - jax.vmap(lambda t: jnp.float32(schedule(t)))(jnp.arange(steps))
    return jnp.mean(exempt + (1 - exempt) * density)


def compute_window(
    sparsity: float,
    steps: int,
    *,
    start: float = 0.25,
    end: float = 0.75,
    power: float | None = 3,
    exempt: float = 0.0,
) -> tuple[int, int]:
    """Return the steps between which to prune, for given shares of the training compute.

    A step costs in proportion to the live parameters, so a quarter of the compute is less than a
    quarter of the steps. With densities 1, then falling with mean m, then d, and the shares of the
    compute start, end - start and 1 - end, the run of all steps T costs
    C = T / (start + (end - start) / m + (1 - end) / d), and the window is from start C to
    T - (1 - end) C / d.

    Args:
      sparsity: the last one, in [0, 1).
      steps: of the whole run.
      start, end: shares of the compute after which pruning begins and ends.
      power: s_t = sparsity (1 - (1 - x)^power) along the window, x from 0 to 1, as in
        ``optax.polynomial_schedule``: 3 is the cubic, 1 the line. None: the density falls in
        equal ratios. (The paper's abstract does not tell the path.)
      exempt: the share of the parameters that is never pruned, in [0, 1].

    Returns:
      (begin, end) in steps, for `gradual` or ``optax.polynomial_schedule(0, sparsity, power, end -
      begin, begin)``.

    Raises:
      ValueError: sparsity outside [0, 1), not 0 <= start < end <= 1, or a window of no step.

    Reference: T. Jin et al., "The Journey Matters: Average Parameter Count over Pre-training
    Unifies Sparse and Dense Scaling Laws", arXiv:2501.12486.

    >>> compute_window(0.8, 10_000)
    (909, 5455)
    """
    check_sparsity(sparsity)
    if not 0 <= start < end <= 1:
        raise ValueError(f"0 <= start < end <= 1 is due: start={start} and end={end} came")
    if power is not None and power <= 0:
        raise ValueError(f"power is {power}, and a positive number or None is due")
    d = 1 - sparsity
    if power is not None:
        mean = d + (1 - d) / (power + 1)
    else:
        mean = (1 - d) / -math.log(d) if d < 1 else 1.0
    cost = lambda density: exempt + (1 - exempt) * density
    total = steps / (start + (end - start) / cost(mean) + (1 - end) / cost(d))
    window = round(start * total), round(steps - (1 - end) * total / cost(d))
    if window[0] >= window[1]:
        raise ValueError(f"{steps} steps leave none to prune in; take more")
    return window
