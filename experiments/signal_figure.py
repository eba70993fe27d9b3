"""The figure of `jaxkit.init.advise`: forward, backward and correlation over the layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, panels
from jaxkit.init.advise import Advice, Row, Verdict

_PANELS = (
    ("output", "Forward: size of the outputs", {"forward-dies", "forward-explodes"}),
    ("backward", "Backward: norm of the gradient", {"backward-dies", "backward-explodes"}),
    ("apart", "1 - correlation of two examples", {"alike"}),
    ("dead", "Units that are zero for every example", {"dead-units"}),
)


def signal_figure(advice: Mapping[str, Advice], size: tuple[float, float] = (9.0, 6.0)) -> Figure:
    """Draw the probes of one model or several, ``{label: advice}``, as `draw_signals` does."""
    figure, axes = panels(2, 2, size)
    draw_signals(axes, advice)
    axes[0].legend()
    return figure


def draw_signals(
    axes: Sequence[Axes],
    advice: Mapping[str, Advice],
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Draw the probes of one model or several, ``{label: advice}``, in four panels.

    Over the layers in order of execution: root mean square of the outputs, norm of the gradients
    relative to that at the model's output, distance between examples (1 - correlation), fraction of
    dead units. A cross marks the leaf that a verdict names. Zeros are left out where the axis is
    logarithmic.

    Args:
      axes: four, one for each panel.
      styles: options of the lines, by label; default: colours in turn, then dashes.
    """
    colors, dashes = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY), ("-", (0, (4, 2)), (0, (1, 1.2)))
    for axis, (field, title, kinds) in zip(axes, _PANELS, strict=True):
        for i, (label, one) in enumerate(advice.items()):
            turn, color = divmod(i, len(colors))
            style = {"color": colors[color], "linestyle": dashes[turn % len(dashes)]}
            style |= (styles or {}).get(label, {})
            values = np.array([getattr(row, field) for row in one.rows], float)
            if field != "dead":
                values = np.where(values > 0, values, np.nan)
            axis.plot(values, label=label, **style)
            named = {verdict.path for verdict in one.verdicts if verdict.kind in kinds}
            for j, row in enumerate(one.rows):
                if row.path in named and np.isfinite(values[j]):
                    axis.plot(j, values[j], "X", color=style["color"], ms=9, mec="white", zorder=3)
        axis.set_title(title)
        if field == "dead":
            axis.set_ylim(-0.02, 1.02)
        else:
            axis.set_yscale("log")
        axis.set_xlabel("layer, in order of execution")


# ---------------------------------------------------------------------------------------- JSON

_FIELDS = ("path", "output", "backward", "apart", "dead")


def rounded(values) -> Any:
    """Return nested lists of numbers with six digits."""
    return [rounded(v) if np.ndim(v) else float(f"{v:.6g}") for v in np.asarray(values)]


def packed(advice: Advice) -> dict[str, Any]:
    """Return what the figure shows of an advice, for JSON."""
    columns = {field: [getattr(row, field) for row in advice.rows] for field in _FIELDS}
    columns |= {field: rounded(columns[field]) for field in _FIELDS[1:]}
    return columns | {"verdicts": [list(verdict) for verdict in advice.verdicts]}


def unpacked(columns: dict[str, Any]) -> Advice:
    """Return what was packed; the rest is NaN."""
    empty = Row._make(["", "", *[math.nan] * 8, True])
    each = zip(*(columns[field] for field in _FIELDS), strict=True)
    rows = tuple(empty._replace(**dict(zip(_FIELDS, values, strict=True))) for values in each)
    verdicts = tuple(Verdict(*verdict) for verdict in columns["verdicts"])
    return Advice(rows, empty, None, verdicts, ())
