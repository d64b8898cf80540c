"""Search for the largest batch or sequence that fits a memory limit."""

from __future__ import annotations

from collections.abc import Callable


def largest(need: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n ≤ ``most`` with ``need(n) <= limit``, 0 if even 1 does not fit; above 64 it may be about 2% too small.

    ``need`` grows with n, about linearly; it is called a few times.

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
        if at_high is None:  # extrapolate
            guess = min(most, 16 * low) if slope <= 0 else min(16 * low, int(low + (limit - at_low) / slope))
        elif halve:
            guess = (low + high) // 2
        else:
            guess = int(low + (limit - at_low) * (high - low) / max(1, at_high - at_low))
        halve = at_high is not None and not halve
    return low
