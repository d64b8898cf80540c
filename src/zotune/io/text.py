"""Metrics, durations and values as text, and text files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


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


def shown(value: Any, most: int = 200) -> str:
    """The `repr` of a value for a message, its middle cut where it is long."""
    text = repr(value) if not isinstance(value, list | dict) or len(value) <= most else f"{type(value).__name__} of {len(value)} values"
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters, its middle cut where it is longer.

    Example:
        >>> shortened("abcdefghijklmnop", 9)
        'abc … nop'
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def read_text(path: str | Path, most: int) -> str:
    """The text of a UTF-8 file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: it is longer, or is not UTF-8. OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is longer than the {most} bytes that such a file may have.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save the file as UTF-8.") from None
