"""What a run leaves for its reader: a summary as JSON and as a table, a curve as PNG, and its peak memory."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.whole_file import whole_file

if TYPE_CHECKING:
    import torch
    from rich.table import Table


@dataclass
class Curve:
    """Points of a run: training loss and an evaluation metric against steps.

    Attributes:
        loss: (step, mean training loss since the last entry).
        metric: (step, value) of the evaluations during training, the one before it (step 0) and the last one.
        metric_name: such as "accuracy" or "loss".
    """

    loss: list[tuple[int, float]]
    metric: list[tuple[int, float]]
    metric_name: str


def curve_of(log_history: Sequence[Mapping[str, Any]], metric_name: str, first: float | None = None) -> Curve:
    """The curve in a `transformers` log history.

    Args:
        log_history: `trainer.state.log_history`.
        metric_name: metric of the evaluations, without its `eval_` prefix.
        first: its value before training.
    """
    loss = {int(entry["step"]): float(entry["loss"]) for entry in log_history if "loss" in entry}
    metric = {int(entry["step"]): float(entry[f"eval_{metric_name}"]) for entry in log_history if f"eval_{metric_name}" in entry}
    if first is not None:
        metric[0] = first
    return Curve(sorted(loss.items()), sorted(metric.items()), metric_name)


def write_curve(curve: Curve, path: Path, title: str = "") -> None:
    """Draws loss (left) and metric (right) against steps, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9.6, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    steps = [step for step, _ in curve.loss]
    values = [value for _, value in curve.loss]
    smoothed = _smoothed(values)
    if len(values) > 10:
        left.plot(steps, values, color="#9db7d5", linewidth=0.9, label="logged")
        left.plot(steps, smoothed, color="#1f4e8c", linewidth=1.8, label="smoothed")
        left.legend(frameon=False)
    else:
        left.plot(steps, values, color="#1f4e8c", marker="o", markersize=3)
    left.set(xlabel="step", ylabel="loss", title="training loss")
    right.plot(*zip(*curve.metric, strict=True) if curve.metric else ([], []), color="#b0561f", marker="o", markersize=4)
    right.set(xlabel="step", ylabel=curve.metric_name, title=f"evaluation {curve.metric_name}")
    if curve.metric_name in ("accuracy", "f1", "exact_match") or curve.metric_name.endswith("_f1"):
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if curve.metric:
        right.annotate(
            metric_text(curve.metric_name, curve.metric[-1][1]),
            curve.metric[-1],
            textcoords="offset points",
            xytext=(-4, 7),
            ha="right",
        )
        right.margins(y=0.2)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that is either the old file or the whole new one, whatever happens; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary_table(rows: Sequence[tuple[str, str]], title: str) -> Table:
    """A two-column table of a run's facts."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def metric_text(name: str, value: float | None) -> str:
    """`0.7843` as `78.4 %` for shares, with four digits otherwise."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if name in ("accuracy", "f1", "exact_match") or name.endswith("_f1") else f"{value:.4g}"


def duration_text(seconds: float) -> str:
    """`75.2` as `75.2 s`, `150` as `2 min 30 s`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def memory_text(size: float) -> str:
    """Bytes as `412 MB` or `3.1 GB` (powers of ten)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


class PeakMemory:
    """Peak memory from `start()` on: the CUDA allocator's on a GPU, the resident set of the process elsewhere.

    Where the system cannot reset its high-water mark (anything but Linux), the peak is that of the whole process.
    """

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self.start()

    def start(self) -> None:
        """Forgets earlier peaks and takes the present use as the baseline."""
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.baseline = torch.cuda.memory_allocated(self._cuda)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark stays the process's
            Path("/proc/self/clear_refs").write_text("5")
        self.baseline = _status_bytes("VmRSS") or _high_water()

    def peak(self) -> int:
        """Peak in bytes since `start()`."""
        if self._cuda is not None:
            import torch

            return torch.cuda.max_memory_allocated(self._cuda)
        # The kernel keeps both figures to within some hundred kilobytes only, so a peak may read below the baseline.
        return max(_status_bytes("VmHWM") or _high_water(), self.baseline)

    @property
    def kind(self) -> str:
        """What the figure counts."""
        return "resident set of the process" if self._cuda is None else "CUDA allocator"


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _high_water() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _smoothed(values: Sequence[float], window: int = 9) -> list[float]:
    half = window // 2
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
