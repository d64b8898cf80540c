"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

#: Longest name that is compared; the time for it grows with the square.
LONGEST = 200


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to a word, or None; case, hyphens and underscores do not count."""
    names = {_plain(name): str(name) for name in itertools.islice(known, 1000) if len(str(name)) <= LONGEST}
    if len(str(word)) > LONGEST:
        return None
    near = difflib.get_close_matches(_plain(word), names, n=1, cutoff=0.5)
    return names[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'"``, or nothing; the caller ends the sentence."""
    near = nearest(word, known)
    return f"; did you mean {near!r}" if near else ""


def did_you_mean_or(word: str, known: Iterable[str], otherwise: str) -> str:
    """``"; did you mean 'x'?"``, or else all known names after ``otherwise``.

    Example:
        >>> did_you_mean_or("adam", ["lozo", "mezo"], "there are")
        '; there are lozo, mezo.'
    """
    names = [str(name) for name in known]
    return f"{near}?" if (near := did_you_mean(word, names)) else f"; {otherwise} {', '.join(names)}."


def _plain(name: object) -> str:
    return str(name).replace("_", "-").lower()
