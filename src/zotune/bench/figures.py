"""Learning curves of a report, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zotune.io.figures import new_figure, svg_text

#: (key of a history entry, label of the axis)
AXES = (("step", "steps"), ("forward_passes", "forward passes"), ("processor_seconds", "processor seconds within steps"))
GPU_SECONDS = ("seconds", "seconds within steps")
#: Distinguishable without color vision too (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6bb1", "#7f7f7f", "#b8860b")
DASHES = ("-", "--", "-.", ":")


def curve(histories: Sequence[Sequence[Mapping[str, Any]]], axis: str, value: str) -> list[tuple[float, float, float, float]]:
    """(x, mean, minimum, maximum) over the runs of a cell, at the steps that all of them logged.

    Args:
        histories: the runs' `history.json` entries.
        axis: key of x, such as "step" or "seconds"; its mean over the runs.
        value: key of y, such as "eval_accuracy" or "loss".
    """
    by_step = [{entry["step"]: entry for entry in entries if value in entry and axis in entry} for entries in histories]
    shared = sorted(set.intersection(*map(set, by_step))) if by_step else []
    points = []
    for step in shared:
        values = [run[step][value] for run in by_step if run[step][value] is not None]
        if values:
            points.append((statistics.fmean(run[step][axis] for run in by_step), statistics.fmean(values), min(values), max(values)))
    return points


def curves(
    series: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    metric: str,
    label_of_metric: str,
    name: str,
    *,
    axes: Sequence[tuple[str, str]] = AXES,
) -> str | None:
    """The SVG of evaluation metric (above) and training loss (below) against each axis, with the range over seeds; None without data.

    The position in ``series`` decides a method's style, so that it is the same in every figure of a report.
    """
    styles = {label: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]) for i, label in enumerate(series)}
    trained = {label: histories for label, histories in series.items() if curve(histories, "step", "loss")}
    if not trained:
        return None
    figure, grid = new_figure(2, len(axes), (4.0 * len(axes), 5.6))
    for column, (axis, text) in enumerate(axes):
        for row, value in enumerate((f"eval_{metric}", "loss")):
            panel = grid[row][column]
            for label, histories in trained.items():
                points = curve(histories, axis, value)
                if not points:
                    continue
                x, mean, low, high = zip(*points, strict=True)
                color, dash = styles[label]
                panel.plot(x, mean, dash, color=color, linewidth=1.6, label=label, marker="o" if row == 0 else "", markersize=3)
                if len(histories) > 1:
                    panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            panel.set_xlabel(text if row == 1 else "")
            if column == 0:
                panel.set_ylabel(label_of_metric if row == 0 else "training loss")
            panel.set_xlim(left=0)
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    return svg_text(figure, name)
