"""Methods: named choices of subspace, direction, estimator and update rule, with the defaults of their papers.

A recipe is a function of keyword options that returns a :class:`Method`; registering it is all it takes to have it in the command, the
tests, the tables and the grids. The name on the command line is the function's, with hyphens: ``lozo_m`` is ``lozo-m``.
"""

from __future__ import annotations

from typing import Any

from zotune.methods.lozo import lozo, lozo_e, lozo_m
from zotune.methods.method import AUTO, Method
from zotune.methods.mezo import mezo, mezo_adam, mezo_momentum
from zotune.methods.registry import Recipe, get, names, options_of, recipe, register

options = options_of

__all__ = [
    "AUTO",
    "Method",
    "Recipe",
    "get",
    "lozo",
    "lozo_e",
    "lozo_m",
    "mezo",
    "mezo_adam",
    "mezo_momentum",
    "names",
    "options",
    "options_of",
    "recipe",
    "recommended",
    "register",
]


def recommended(**options: Any) -> Method:
    """The library's own choice, and the default of ``zotune train``."""
    return get("lozo-e", **options)
