"""The registry of methods: a recipe is a function of keyword options that returns a :class:`Method`, entered under its name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from zotune.methods.method import Method

Recipe = Callable[..., Method]
_RECIPES: dict[str, Recipe] = {}
#: Entry points of installed packages that name modules with recipes of their own.
GROUP = "zotune.methods"


def register(recipe: Recipe) -> Recipe:
    """Enter a recipe under its function's name. Its keyword defaults are the method's defaults."""
    name = recipe.__name__.replace("_", "-")

    @functools.wraps(recipe)
    def build(**options: Any) -> Method:
        known = options_of(name)
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
                raise ValueError(f"method {name!r} has no option {option!r}; {hint}")
        method = recipe(**options)
        assert method.name == name, f"recipe {name} names its method {method.name}"
        return dataclasses.replace(method, options=known | options)

    _RECIPES[name] = build
    return build


@functools.cache
def _load_others() -> None:
    """Import what other packages register, once."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # somebody else's code
            warnings.warn(f"the methods of {point.value} (entry point {point.name!r}) cannot be loaded: {error}", stacklevel=3)


def options_of(name: str) -> dict[str, Any]:
    """The keyword options of a method, with their defaults."""
    signature = inspect.signature(inspect.unwrap(recipe(name)))
    return {option: parameter.default for option, parameter in signature.parameters.items()}


def names() -> list[str]:
    """The methods there are, in alphabetical order."""
    _load_others()
    return sorted(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none, with the nearest.
    """
    if name not in _RECIPES:
        _load_others()
    if name not in _RECIPES:
        near = difflib.get_close_matches(name.replace("_", "-").lower(), _RECIPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_RECIPES)}."
        raise ValueError(f"unknown method {name!r}; {hint}")
    return _RECIPES[name]


def get(name: str, **options: Any) -> Method:
    """The method of a name, its defaults overridden by ``options``.

    Example:
        >>> get("lozo", rank=4).subspace.rank
        4
    """
    return recipe(name)(**options)
