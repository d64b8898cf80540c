"""Metrics and durations as text."""

from __future__ import annotations

import math


def is_share(name: str) -> bool:
    """Whether a metric is a share in [0, 1], shown in percent."""
    return name in ("accuracy", "f1", "exact_match") or name.endswith("_f1")


def metric_text(name: str, value: float | None) -> str:
    """`0.7843` as `78.4 %` for shares, with four digits otherwise."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.4g}"


def duration_text(seconds: float) -> str:
    """`75.2` as `75.2 s`, `150` as `2 min 30 s`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
