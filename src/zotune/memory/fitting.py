"""The largest batch or sequence that fits a card, by few estimates."""

from __future__ import annotations

import re
from collections.abc import Callable

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(text: str) -> int:
    """Bytes of a size such as ``24GB`` or ``80 GiB``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper() if match else "?")
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"a memory size is a number with a unit, such as 24GB or 80GiB, not {text!r}.")
    return round(float(match[1]) * unit)


def largest(need: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n up to ``most`` with ``need(n) <= limit``, 0 if even 1 does not fit; above 64 to about 2% (what is given does fit).

    ``need`` grows with n, about linearly, and is called a few times only.

    Example:
        >>> largest(lambda n: 100 + 7 * n, limit=200, most=1000)
        14
    """
    low, high = 1, most + 1
    at_low, at_high = need(1), None
    if at_low > limit:
        return 0
    guess, halve = 2, False
    while high - low > max(1, low // 50):
        guess = min(max(guess, low + 1), high - 1)
        size = need(guess)
        slope = (size - at_low) / (guess - low)
        if size <= limit:
            low, at_low = guess, size
        else:
            high, at_high = guess, size
        if at_high is None:  # the line goes on
            guess = min(most, 16 * low) if slope <= 0 else min(16 * low, int(low + (limit - at_low) / slope))
        elif halve:
            guess = (low + high) // 2
        else:
            guess = int(low + (limit - at_low) * (high - low) / max(1, at_high - at_low))
        halve = at_high is not None and not halve
    return low
