"""The curve of a run: training loss and evaluation metric over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.io.figures import new_figure, save_figure
from zotune.io.text import is_share, metric_text

_MARGINS = {"left": 0.08, "right": 0.98, "bottom": 0.15, "top": 0.83, "wspace": 0.22}


@dataclass
class Curve:
    """Training loss and an evaluation metric over steps.

    Attributes:
        loss: (step, mean training loss since the last entry).
        metric: (step, value) of the evaluations, the one before training at step 0.
        metric_name: such as "accuracy" or "loss".
    """

    loss: list[tuple[int, float]]
    metric: list[tuple[int, float]]
    metric_name: str


def curve_of(log_history: Sequence[Mapping[str, Any]], metric_name: str, first: float | None = None) -> Curve:
    """The curve of a `transformers` log history, for a metric without `eval_` prefix and its value before training."""
    loss = {int(entry["step"]): float(entry["loss"]) for entry in log_history if "loss" in entry}
    metric = {int(entry["step"]): float(entry[f"eval_{metric_name}"]) for entry in log_history if f"eval_{metric_name}" in entry}
    if first is not None:
        metric[0] = first
    return Curve(sorted(loss.items()), sorted(metric.items()), metric_name)


def write_curve(curve: Curve, path: Path, title: str = "") -> None:
    """Draws loss (left) and metric (right) over steps."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, panels = new_figure(1, 2, (9.6, 3.6), _MARGINS)
    left, right = panels[0]
    if title:
        figure.suptitle(title, fontsize=11)
    steps = [step for step, _ in curve.loss]
    values = [value for _, value in curve.loss]
    if len(values) > 10:
        left.plot(steps, values, color="#9db7d5", linewidth=0.9, label="logged")
        left.plot(steps, _smoothed(values), color="#1f4e8c", linewidth=1.8, label="smoothed")
        left.legend(frameon=False)
    else:
        left.plot(steps, values, color="#1f4e8c", marker="o", markersize=3)
    left.set(xlabel="step", ylabel="loss", title="training loss")
    right.plot(*zip(*curve.metric, strict=True) if curve.metric else ([], []), color="#b0561f", marker="o", markersize=4)
    right.set(xlabel="step", ylabel=curve.metric_name, title=f"evaluation {curve.metric_name}")
    if is_share(curve.metric_name):
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if curve.metric:
        last = metric_text(curve.metric_name, curve.metric[-1][1])
        right.annotate(last, curve.metric[-1], textcoords="offset points", xytext=(-4, 7), ha="right")
        right.margins(y=0.2)
    for panel in (left, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    save_figure(figure, path)


def _smoothed(values: Sequence[float], window: int = 9) -> list[float]:
    half = window // 2
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]
