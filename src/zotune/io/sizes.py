"""Amounts of memory from and to text."""

from __future__ import annotations

import re

_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]?)(i?)(b?)\s*")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24GB``, ``80 GiB``, ``500MB`` or ``1e9``; ``k``, ``M``, ``G``, ``T`` are powers of 10³, ``Ki`` … of 2¹⁰.

    Raises:
        ValueError: it is no size, or 0.

    Example:
        >>> parse_size("1.5 GiB")
        1610612736
    """
    match = _SIZE.fullmatch(text.lower())
    if match is None or (match[3] and not (match[2] and match[4])) or not float(match[1]):
        raise ValueError(f"{text!r} is no amount of memory; write a number with a unit, such as 24GB or 18GiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES[match[2]])


def size_text(size: float, *, binary: bool = False) -> str:
    """Bytes with three digits, in powers of ten or (``binary``) of two; ``–`` for 0.

    Example:
        >>> size_text(412_300_000), size_text(3.1e9), size_text(2**36, binary=True)
        ('412 MB', '3.1 GB', '64 GiB')
    """
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if binary else (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    for unit, value in units:
        if size >= 0.9995 * value:
            return f"{size / value:.3g} {unit}" if size < 999.5 * value else f"{size / value:.0f} {unit}"
    return f"{size:.0f} B" if size else "–"
