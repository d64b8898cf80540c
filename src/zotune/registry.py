"""A registry of recipes: named functions of keyword options, one for methods and one for baselines."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from zotune.io.suggest import did_you_mean_or


class Product(Protocol):
    """What a recipe returns: a dataclass that knows its name and the options it was made with."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Product)


class Registry(Generic[T]):
    """Recipes by name. A function ``lozo_m`` is entered as ``lozo-m``; its keyword parameters are the options.

    Args:
        kind: what a recipe makes, for messages.
        group: entry points under which installed packages name modules with recipes of their own; None: there are none.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self.recipes: dict[str, Callable[..., T]] = {}
        self._entry_points_loaded = group is None

    def register(self, recipe: Callable[..., T]) -> Callable[..., T]:
        """Enter a recipe under its function's name. Its keyword defaults are the defaults of what it makes."""
        name = recipe.__name__.replace("_", "-")

        @functools.wraps(recipe)
        def build(**options: Any) -> T:
            known = self.options_of(name)
            for option in options:
                if option not in known:
                    hint = did_you_mean_or(option, known, "it takes") if known else "; it takes none."
                    raise ValueError(f"{self.kind} {name!r} has no option {option!r}{hint}")
            made = recipe(**options)
            assert made.name == name, f"recipe {name} names its {self.kind} {made.name}"
            return dataclasses.replace(made, options=known | options)

        self.recipes[name] = build
        return build

    def options_of(self, name: str) -> dict[str, Any]:
        """The keyword options of a recipe, with their defaults.

        Raises:
            ValueError: the name is unknown. The message names the nearest.
        """
        return {option: each.default for option, each in inspect.signature(self.recipe(name)).parameters.items()}

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        self._load_entry_points()
        return sorted(self.recipes)

    def recipe(self, name: str) -> Callable[..., T]:
        """The recipe of a name.

        Raises:
            ValueError: the name is unknown. The message names the nearest.
        """
        if name not in self.recipes:
            self._load_entry_points()
        if name not in self.recipes:
            raise ValueError(unknown(self.kind, name, self.recipes))
        return self.recipes[name]

    def get(self, name: str, **options: Any) -> T:
        """What the recipe of a name makes with these options; its defaults fill in the others.

        Raises:
            ValueError: a name or an option is unknown, or a value makes no sense. The message names the nearest.
        """
        return self.recipe(name)(**options)

    def forget_entry_points(self) -> None:
        """Load the entry points again when a name is next looked up."""
        self._entry_points_loaded = self.group is None

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded or self.group is None:
            return
        self._entry_points_loaded = True
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # somebody else's code
                warnings.warn(f"the {self.kind}s of {point.value} (entry point {point.name!r}) cannot be loaded: {error}", stacklevel=4)


def unknown(kind: str, name: str, known: Any) -> str:
    """The message for a name that is not registered."""
    return f"unknown {kind} {name!r}{did_you_mean_or(name, known, 'there are')}"
