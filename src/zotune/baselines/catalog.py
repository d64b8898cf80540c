"""Both registries as one: zeroth-order methods and baselines, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zotune import baselines, methods
from zotune.baselines import Baseline
from zotune.methods import Method
from zotune.registry import unknown


def names() -> list[str]:
    """All methods, the zeroth-order ones first."""
    return [*methods.names(), *baselines.names()]


def is_baseline(name: str) -> bool:
    """Whether a name is that of a baseline.

    Raises:
        ValueError: the name is unknown. The message names the nearest.
    """
    if name in baselines.names():
        return True
    if name in methods.names():
        return False
    raise ValueError(unknown("method", name, names()))


def recipe(name: str) -> Callable[..., Method | Baseline]:
    """The recipe of a name; ValueError with the nearest where there is none."""
    return baselines.recipe(name) if is_baseline(name) else methods.recipe(name)


def options_of(name: str) -> dict[str, Any]:
    """The keyword options of a method, with their defaults."""
    return baselines.options_of(name) if is_baseline(name) else methods.options_of(name)


def get(name: str, **options: Any) -> Method | Baseline:
    """The method of a name, its defaults overridden by ``options``; ValueError with the nearest name or option."""
    return baselines.get(name, **options) if is_baseline(name) else methods.get(name, **options)
