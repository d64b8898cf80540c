"""Bars of memory, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zotune.io.figures import new_figure, save_figure
from zotune.memory.ledger import KINDS, Split

COLORS = dict(zip(KINDS, ("#4477aa", "#ee6677", "#ccbb44", "#66ccee", "#aa3377", "#228833", "#bbbbbb"), strict=True))


def bar_chart(splits: Mapping[str, Split], path: str | Path, title: str, limit: int | None = None) -> None:
    """Draws a bar a method, stacked by kind, in GB of 10⁹ bytes.

    Args:
        splits: by the bar's name.
        path: the PNG to write.
        title: above the chart.
        limit: bytes of a card, drawn as a line.
    """
    figure, panels = new_figure(1, 1, (8, 0.55 * len(splits) + 1.9))
    axis = panels[0][0]
    axis.grid(visible=False)
    names = list(splits)
    left = [0.0] * len(names)
    for kind in KINDS:
        sizes = [splits[name].kinds.get(kind, 0) / 1e9 for name in names]
        axis.barh(names, sizes, left=left, label=kind, color=COLORS[kind], height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    top = max(left)
    for place, total in enumerate(left):
        axis.text(total + 0.01 * top, place, f"{total:.3g} GB", va="center", fontsize=8)
    if limit is not None:
        axis.axvline(limit / 1e9, color="black", linestyle="--", linewidth=1)
        axis.text(limit / 1e9, -0.6, f" {limit / 1e9:g} GB", fontsize=8, va="bottom")
        top = max(top, limit / 1e9)
    axis.set_xlim(0, 1.15 * top)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="peak memory, GB")
    figure.legend(ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    save_figure(figure, path)
