"""Caches of tensors that are cleared together, because real steps and dry runs must not share cached tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_clears: list[Callable[[], None]] = []


def on_clear(clear: Callable[[], None]) -> None:
    """Call ``clear`` whenever the caches are cleared."""
    _clears.append(clear)


def tensor_cache(maxsize: int | None = None) -> Callable[[F], F]:
    """``functools.lru_cache`` of a function that makes tensors, cleared by :func:`clear_tensor_caches`."""

    def decorate(function: F) -> F:
        cached = functools.lru_cache(maxsize)(function)
        on_clear(cached.cache_clear)
        return cast(F, cached)

    return decorate


def clear_tensor_caches() -> None:
    """Clear all caches of tensors."""
    for clear in _clears:
        clear()
