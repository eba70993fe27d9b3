"""The look that all figures share: colours that the colour-blind can tell apart, few lines.

The runner draws every figure with `STYLE` (``matplotlib.rc_context``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Masataka Okabe and Kei Ito, "Color Universal Design"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#767676",
)

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.titlepad": 9,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "lines.linewidth": 1.8,
    "errorbar.capsize": 2.5,
}


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of `size` inches and its axes, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def band(axes: Axes, x, values, color: str, label: str, **options) -> None:
    """Draw the mean over the last axis of `values` against `x`, and the range as a band."""
    values = np.asarray(values)
    axes.plot(x, values.mean(-1), color=color, label=label, **options)
    axes.fill_between(x, values.min(-1), values.max(-1), color=color, alpha=0.18, linewidth=0)


def spread(values) -> np.ndarray:
    """Return how far the range of the last axis reaches below and above the mean: error bars."""
    values = np.asarray(values)
    mean = values.mean(-1)
    # the mean of equal values may be an ulp off them
    return np.maximum(np.stack([mean - values.min(-1), values.max(-1) - mean]), 0)


def percent(fraction: float) -> str:
    """Write a fraction as a percentage.

    >>> percent(0.125)
    '12.5%'
    """
    return f"{100 * fraction:.1f}%"


def count(steps: float) -> str:
    """Write a number of steps, that is infinite if it was not reached.

    >>> count(12.0), count(float("inf"))
    ('12 steps', 'not within the run')
    """
    return f"{steps:.0f} steps" if np.isfinite(steps) else "not within the run"


def note(seeds: int) -> str:
    """Say what lines and bands are."""
    return f"Lines, points and bars: mean of {seeds} seeds. Bands and error bars: their range."
