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
    found = {1: need(1)}
    if found[1] > limit:
        return 0
    low, high = 1, most + 1
    guess = min(2, most)
    while high - low > max(1, low // 50):
        guess = min(max(guess, low + 1), high - 1)
        found[guess] = need(guess)
        if found[guess] <= limit:
            low = guess
        else:
            high = guess
        # The line through the two points nearest to the limit.
        a, b = sorted(sorted(found, key=lambda n: abs(found[n] - limit))[:2])
        slope = (found[b] - found[a]) / (b - a)
        guess = most if slope <= 0 else int(a + (limit - found[a]) / slope)
    return low
