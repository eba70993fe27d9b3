"""Learning-rate schedules that optax lacks.

A schedule is ``count -> value`` and `count` may be traced; past its last step it keeps its last
value. What optax has is not repeated: linear decay, the best worst-case schedule for the last
iterate (arXiv:2310.07831), is ``optax.linear_schedule(peak, 0.0, steps)``.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxkit._known import violates

__all__ = ["cosine_power", "odds", "refined", "rewarm", "stretch", "uba"]


def odds(x: Float[Array, "..."], ratio: float | Array) -> Float[Array, "..."]:
    """Multiply the odds of a share x in [0, 1] by a ratio: y / (1 - y) = ratio x / (1 - x).

    >>> odds(jnp.array([0.0, 0.5, 1.0]), 3.0).tolist()
    [0.0, 0.75, 1.0]
    """
    return ratio * x / (1 + (ratio - 1) * x)


def _shaped(shape, peak, steps, warmup, floor, start) -> optax.Schedule:
    """Warm up linearly, then go from peak to floor as shape(x), x the half cosine from 1 to 0."""
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup}, and a number from 0 to below steps={steps} was due")

    def schedule(count):
        done = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
        value = floor + (peak - floor) * shape((1 + jnp.cos(jnp.pi * done)) / 2)
        rising = start + (peak - start) * count / max(warmup, 1)
        return jnp.where(count < warmup, rising, value)

    return schedule


def uba(
    peak: float | Array,
    steps: int,
    *,
    phi: float | Array = 1.0,
    warmup: int = 0,
    floor: float | Array = 0.0,
    start: float | Array = 0.0,
) -> optax.Schedule:
    """The unified budget-aware schedule: the odds of a cosine times 2 / phi.

    lr = floor + (peak - floor) 2 (1 + c) / (2 phi + (2 - phi) (1 + c)), c = cos(pi t') with t' the
    share of the steps after the warmup. phi = 2 is the cosine; a smaller phi stays high for longer,
    a larger one falls early.

    Args:
      peak: the largest value.
      steps: the number of steps, warmup included.
      phi: above 0. (The paper's choice per task is not known; 1 is ours.)
      warmup: steps of linear warmup from `start`.
      floor: the last value.

    Raises:
      ValueError: phi not above 0, or a warmup that is not shorter than steps.

    Reference: A. Tang et al., "Stepsize anything: A unified learning rate schedule for
    budgeted-iteration training", arXiv:2505.24452.

    >>> schedule = uba(1.0, 10, phi=1.0)
    >>> [round(float(schedule(t)), 4) for t in (0, 5, 10, 99)]
    [1.0, 0.6667, 0.0, 0.0]
    """
    if violates(lambda v: v > 0, phi):
        raise ValueError(f"phi={phi}, and a number above 0 was due")
    return _shaped(lambda x: odds(x, 2 / phi), peak, steps, warmup, floor, start)


def cosine_power(
    peak: float | Array,
    steps: int,
    *,
    power: float | Array = 10.0,
    warmup: int = 0,
    floor: float | Array = 0.0,
    start: float | Array = 0.0,
) -> optax.Schedule:
    """Cosine power annealing: lr = floor + (peak - floor) (p^x - 1) / (p - 1), x the half cosine.

    It falls faster than the cosine, which is the limit p -> 1, and stays low for longer; half way
    it is at 1 / (1 + sqrt(p)). (The authors' code makes a table by epoch, less than 7e-4 away for
    100 epochs.)

    Args:
      peak, steps, warmup, floor, start: as for `uba`.
      power: p >= 1; the paper's are 10 for ImageNet and 2 for CIFAR-10.

    Raises:
      ValueError: a power below 1, or a warmup that is not shorter than steps.

    Reference: A. Hundt, V. Jain, G. D. Hager, "sharpDARTS: Faster and More Accurate Differentiable
    Architecture Search", arXiv:1903.09900.

    >>> schedule = cosine_power(1.0, 10, power=4.0)
    >>> [round(float(schedule(t)), 4) for t in (0, 5, 10)]
    [1.0, 0.3333, 0.0]
    """
    if violates(lambda p: p >= 1, power):
        raise ValueError(f"power={power}, and a number of at least 1 was due")

    def shape(x):
        rate = jnp.log(jnp.asarray(power, jnp.float32))
        small = rate < 1e-4  # there (p^x - 1) / (p - 1) is x to rounding
        rate = jnp.where(small, 1.0, rate)
        return jnp.where(small, x, jnp.expm1(rate * x) / jnp.expm1(rate))

    return _shaped(shape, peak, steps, warmup, floor, start)


def rewarm(
    peak: float,
    steps: int,
    *,
    start: float = 0.0,
    warmup: float = 0.01,
    floor: float = 0.1,
) -> optax.Schedule:
    """Warm up again to train on: from `start` to peak, then by a cosine to floor * peak.

    For continuing a run that has decayed: count its steps from 0 (a finished cosine stays at its
    floor), start at the rate it ended with, and keep the optimizer's moments together with their
    own count. ``optax.warmup_cosine_decay_schedule`` with the paper's numbers.

    Args:
      peak: the largest value; a larger one learns more of the new data and forgets more of the old.
      steps: those of the new data.
      start: the value at step 0.
      warmup: its share of the steps; the paper finds that it hardly matters (0 to 0.02).
      floor: the last value, as a share of the peak.

    Reference: K. Gupta et al., "Continual Pre-Training of Large Language Models: How to (re)warm
    your model?", arXiv:2308.04014.

    >>> schedule = rewarm(1.0, 200, start=0.1)
    >>> [round(float(schedule(t)), 3) for t in (0, 2, 200)]
    [0.1, 1.0, 0.1]
    """
    return optax.warmup_cosine_decay_schedule(
        start, peak, round(warmup * steps), steps, floor * peak
    )


def stretch(schedule: optax.Schedule, factor: float | Array) -> optax.Schedule:
    """Stretch a schedule in time: every boundary comes `factor` times as late.

    Regime adaptation to a batch that is larger by ``factor = ceil(large / small)``: a schedule over
    epochs is stretched by it, and there are as many updates as before. A schedule over updates
    stays as it is then, and ``stretch(schedule, 1 / factor)`` is what the same number of epochs
    would make of it, which costs accuracy. (The learning rate grows by sqrt(large / small), and the
    gradient is clipped to a global norm of 5 after averaging.)

    Boundaries are met exactly for integer factors: count m * factor is the first to have the value
    of count m, up to 2^24.

    Args:
      schedule: ``count -> value``; it is asked for fractions of a step in between.
      factor: above 0.

    Raises:
      ValueError: a factor not above 0.

    Reference: E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", arXiv:1705.08741.

    >>> steps = optax.piecewise_constant_schedule(1.0, {2: 0.1})
    >>> [round(float(stretch(steps, 3)(t)), 4) for t in (0, 5, 6, 7)]
    [1.0, 1.0, 0.1, 0.1]
    """
    if violates(lambda v: v > 0, factor):
        raise ValueError(f"factor={factor}, and a number above 0 was due")

    def stretched(count):
        # not count / factor, which compilers round: m * factor * (1 / factor) may be below m
        whole = jnp.floor_divide(count, factor)
        return schedule(whole + (count - whole * factor) / factor)

    return stretched


def refined(
    norms: Float[np.ndarray, " steps"],
    peak: float | Array = 1.0,
    *,
    steps: int | None = None,
    norm: Literal["l1", "l2"] = "l2",
    smooth: float = 0.1,
) -> optax.Schedule:
    """Refine a schedule from the gradient norms of a run: warmup and fast decay where they pay.

    With G_t the norms after a median filter, w_t = G_t^-2 (l2 norms, for SGD) or G_t^-1 (l1 norms,
    for Adam and its kin): lr_t is proportional to w_t sum_{p > t} w_p, and its largest value is
    `peak`. Constant norms give linear decay, (T - 1 - t) / (T - 1).

    Args:
      norms: of the gradient of each step of an earlier run, before any clipping; on the host.
      peak: the largest value; tune it for the schedule.
      steps: of the run to come, if it is of another length: the table is interpolated.
      norm: which norm `norms` are.
      smooth: the width of the median filter as a share of the steps, 0 for none.

    Raises:
      ValueError: fewer than two norms, one that is negative or not finite, or another `norm`.

    Reference: A. Defazio, A. Cutkosky, H. Mehta, K. Mishchenko, "When, Why and How Much? Adaptive
    Learning Rate Scheduling by Refinement", arXiv:2310.07831.

    >>> [float(refined(np.ones(5))(t)) for t in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    from scipy.ndimage import median_filter

    if norm not in ("l1", "l2"):
        raise ValueError(f"norm={norm!r}, and 'l1' or 'l2' was due")

    g = np.asarray(norms, np.float64)
    if g.ndim != 1 or len(g) < 2 or not np.all(np.isfinite(g)) or np.any(g < 0) or not g.any():
        raise ValueError(
            "norms of at least two steps are due: one axis of finite numbers, not negative, not "
            f"all 0; shape {g.shape} came"
        )
    if smooth > 0:
        width = 2 * int(smooth * len(g) / 2) + 1
        padded = np.pad(g, (0, min(2 * width, len(g) - 1)), mode="reflect")
        g = median_filter(padded, size=width, mode="nearest")[: len(g)]
    g = np.maximum(g, 1e-12 * g.max())
    weight = g**-2.0 if norm == "l2" else 1 / g
    after = np.concatenate([np.cumsum(weight[::-1])[::-1][1:], [0.0]])
    table = weight * after
    table = table / table.max()
    if steps is not None:
        table = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(table)), table)
    values = jnp.asarray(table, jnp.float32)
    return lambda count: peak * jnp.interp(count, jnp.arange(len(table)), values)
