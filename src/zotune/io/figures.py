"""Figures in one style, written atomically; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.io.atomic import whole_file


def new_figure(rows: int, columns: int, size: tuple[float, float], margins: Mapping[str, float] | None = None) -> tuple[Any, Any]:
    """A matplotlib figure of ``size`` inches and its panels, an array (rows, columns).

    Args:
        margins: around the panels, as `subplots_adjust` takes them; None: measured, which takes as long as drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained" if margins is None else None)
    if margins is not None:
        figure.subplots_adjust(**margins)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def stacked_bars(
    bars: Mapping[str, Sequence[float]], parts: Mapping[str, str], unit: str, title: str = "", limit: float | None = None
) -> Any:
    """A figure of horizontal bars whose parts add up, with the sum beside each.

    Args:
        bars: by label, from top to bottom; the sizes of the parts.
        parts: their names and colors.
        unit: of the axis.
        title: above the bars.
        limit: a size to draw as a line across them.
    """
    figure, panels = new_figure(1, 1, (8.4, 1.7 + 0.4 * len(bars)))
    panel = panels[0][0]
    panel.grid(visible=False, axis="y")
    labels, left = list(bars), [0.0] * len(bars)
    for (part, color), sizes in zip(parts.items(), zip(*bars.values(), strict=True), strict=True):
        panel.barh(labels, sizes, left=left, label=part, color=color, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    most = max(left)
    for place, total in enumerate(left):
        panel.text(total + 0.01 * most, place, f"{total:.3g}", va="center", fontsize=8)
    if limit is not None:
        panel.axvline(limit, color="black", linestyle="--", linewidth=1)
        panel.text(limit, -0.6, f" {limit:g}", fontsize=8, va="bottom")
        most = max(most, limit)
    panel.set_xlim(0, 1.12 * most)
    panel.invert_yaxis()
    panel.set(title=title, xlabel=unit)
    figure.legend(ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure in the format of the file's suffix, by default PNG."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format=Path(path).suffix.removeprefix(".") or "png")


def svg_text(figure: Any, name: str) -> str:
    """The figure as SVG, deterministic; ``name`` makes its ids unique among the figures of a page."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
