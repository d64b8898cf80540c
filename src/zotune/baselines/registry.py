"""The registry of baselines."""

from __future__ import annotations

from zotune.baselines.baseline import Baseline
from zotune.registry import Registry

BASELINES: Registry[Baseline] = Registry("method")

register, options_of, recipe, get = BASELINES.register, BASELINES.options_of, BASELINES.recipe, BASELINES.get


def names() -> list[str]:
    """The baselines there are, in the order in which they were registered."""
    return list(BASELINES.recipes)
