"""The registry of rivals, with the manners of the one of methods."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from zotune.first_order.rival import Rival

Recipe = Callable[..., Rival]
_RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Enter a recipe under its function's name. Its keyword defaults are the method's defaults."""
    name = recipe.__name__.replace("_", "-")

    @functools.wraps(recipe)
    def build(**options: Any) -> Rival:
        known = options_of(name)
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                takes = f"it takes {', '.join(known)}." if known else "it takes none."
                raise ValueError(f"method {name!r} has no option {option!r}; {f'did you mean {near[0]!r}?' if near else takes}")
        rival = recipe(**options)
        assert rival.name == name, f"recipe {name} names its method {rival.name}"
        return dataclasses.replace(rival, options=known | options)

    _RECIPES[name] = build
    return build


def options_of(name: str) -> dict[str, Any]:
    """The keyword options of a method, with their defaults."""
    signature = inspect.signature(inspect.unwrap(recipe(name)))
    return {option: parameter.default for option, parameter in signature.parameters.items()}


def names() -> list[str]:
    """The rivals there are."""
    return list(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none, with the nearest.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(name.replace("_", "-").lower(), _RECIPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_RECIPES)}."
        raise ValueError(f"unknown method {name!r}; {hint}")
    return _RECIPES[name]


def get(name: str, **options: Any) -> Rival:
    """The rival of a name, its defaults overridden by ``options``.

    Raises:
        ValueError: an unknown name or option, with the nearest.
    """
    return recipe(name)(**options)
