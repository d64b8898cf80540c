"""The curve of a run: training loss, or reward, and evaluation metric over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.io.figures import new_figure, save_figure
from zotune.io.text import is_share, metric_text

_MARGINS = {"left": 0.08, "right": 0.98, "bottom": 0.15, "top": 0.83, "wspace": 0.22}


@dataclass
class Curve:
    """Training loss, or reward, and an evaluation metric over steps.

    Attributes:
        training: (step, mean training loss or reward since the last entry).
        metric: (step, value) of the evaluations, the one before training at step 0.
        metric_name: such as "accuracy" or "loss".
        training_name: "loss" or "reward".
        spread: standard deviation of the training rewards, by step.
    """

    training: list[tuple[int, float]]
    metric: list[tuple[int, float]]
    metric_name: str
    training_name: str = "loss"
    spread: dict[int, float] = field(default_factory=dict)


def curve_of(log_history: Sequence[Mapping[str, Any]], metric_name: str, first: float | None = None) -> Curve:
    """The curve of a `transformers` log history, for a metric without `eval_` prefix and its value before training."""
    name = "reward" if any("reward" in entry for entry in log_history) else "loss"
    training = {int(entry["step"]): float(entry[name]) for entry in log_history if name in entry}
    spread = {int(entry["step"]): float(entry["reward_std"]) for entry in log_history if "reward_std" in entry}
    metric = {int(entry["step"]): float(entry[f"eval_{metric_name}"]) for entry in log_history if f"eval_{metric_name}" in entry}
    if first is not None:
        metric[0] = first
    return Curve(sorted(training.items()), sorted(metric.items()), metric_name, name, spread)


def write_curve(curve: Curve, path: Path, title: str = "") -> None:
    """Draws loss or reward (left; the rewards' spread as a band) and metric (right) over steps."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, panels = new_figure(1, 2, (9.6, 3.6), _MARGINS)
    left, right = panels[0]
    if title:
        figure.suptitle(title, fontsize=11)
    steps = [step for step, _ in curve.training]
    values = [value for _, value in curve.training]
    if curve.spread:
        spread = [curve.spread.get(step, 0.0) for step in steps]
        low, high = ([value + sign * each for value, each in zip(values, spread, strict=True)] for sign in (-1, 1))
        left.fill_between(steps, low, high, color="#1f4e8c", alpha=0.12, linewidth=0, label="± standard deviation")
    if len(values) > 10:
        left.plot(steps, values, color="#9db7d5", linewidth=0.9, label="logged")
        left.plot(steps, _smoothed(values), color="#1f4e8c", linewidth=1.8, label="smoothed")
    else:
        left.plot(steps, values, color="#1f4e8c", marker="o", markersize=3)
    if curve.spread or len(values) > 10:
        left.legend(frameon=False)
    left.set(xlabel="step", ylabel=curve.training_name, title=f"training {curve.training_name}")
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
