"""The figure of `jaxkit.init.advise`: forward, backward and correlation over the layers."""

import numpy as np
from matplotlib.figure import Figure

from experiments.figures import BLUE, GREEN, GREY, ORANGE, RED, panels
from jaxkit.init.advise import Advice


def signal_figure(advice: dict[str, Advice], size: tuple[float, float] = (9.0, 6.0)) -> Figure:
    """Draw the probes of one model or several: {label: advice}.

    Four panels over the layers in order of execution: size of the outputs, norm of the gradients
    relative to the output's, distance between examples (1 - correlation), dead units. A cross marks
    the leaf that a verdict names.
    """
    fields = (
        ("output", "forward: size of the output", {"forward-dies", "forward-explodes"}),
        ("backward", "backward: norm of the gradient", {"backward-dies", "backward-explodes"}),
        ("apart", "1 - correlation of two examples", {"alike"}),
        ("dead", "units that are zero for every example", {"dead-units"}),
    )
    figure, axes = panels(2, 2, size)
    colors = (BLUE, ORANGE, GREEN, RED, GREY)
    for axis, (field, title, kinds) in zip(axes, fields, strict=True):
        for i, (label, one) in enumerate(advice.items()):
            color = colors[i % len(colors)]
            values = np.array([getattr(row, field) for row in one.rows], float)
            if field != "dead":
                values = np.where(values > 0, values, np.nan)  # the axis is logarithmic
            axis.plot(values, color=color, label=label)
            for verdict in one.verdicts:
                at = [j for j, row in enumerate(one.rows) if row.path == verdict.path]
                if verdict.kind in kinds and at and np.isfinite(values[at[0]]):
                    axis.plot(at[0], values[at[0]], "x", color=color, markersize=8)
        axis.set_title(title)
        if field == "dead":
            axis.set_ylim(-0.02, 1.02)
        else:
            axis.set_yscale("log")
        axis.set_xlabel("layer, in order of execution")
    axes[0].legend()
    return figure
