"""Figures in one style, written whole or not at all; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from zotune.io.atomic import whole_file


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure of ``size`` inches and its panels, an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure in the format that the file's name asks for; PNG without one."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format=Path(path).suffix.removeprefix(".") or "png")


def svg_text(figure: Any, name: str) -> str:
    """The figure as SVG. The same figure gives the same text; ``name`` keeps its ids apart from those of other figures of a page."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
