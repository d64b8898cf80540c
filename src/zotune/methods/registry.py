"""The registry of methods. A recipe states what a method has of its own; the options common to all are added here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from zotune.methods.method import Method
from zotune.registry import Registry

Recipe = Callable[..., Method]
#: Fields of :class:`Method` that a recipe sets.
Fields = Mapping[str, Any]

#: Installed packages add methods of their own under the entry point group ``zotune.methods``.
METHODS: Registry[Method] = Registry("method", "zotune.methods")
options_of, names, recipe, get = METHODS.options_of, METHODS.names, METHODS.recipe, METHODS.get

#: Options of every recipe but those that do not take them: type and default. Each is a field of :class:`Method`.
COMMON: dict[str, tuple[str, Any]] = {
    "lr": ("float", 1e-6),
    "eps": ("float | str", 1e-3),
    "num_directions": ("int", 1),
    "directions_per": ("str", "batch"),
    "group_size": ("int", 1),
    "direction": ("str", "gaussian"),
    "estimator": ("str", "central"),
    "fitness": ("str", "loss"),
    "rounding": ("str", "stochastic"),
}
#: The common options of methods whose estimates can be of groups or single examples.
PER = ("directions_per", "group_size")
#: Options of a recipe that takes any update rule.
RULE: dict[str, tuple[str, Any]] = {"update_rule": ("str", "SGD"), "update_rule_args": ("dict[str, Any] | None", None)}


@dataclass(frozen=True)
class Definition:
    """What :func:`register` is told of a recipe.

    Args:
        fields: the decorated function: its keyword-only options -> fields of :class:`Method`.
        title, arxiv: of :class:`Method`.
        without: common options that the recipe does not take.
        any_rule: whether the update rule is an option.
        defaults: of common options, where they differ from :data:`COMMON`.
        fixed: positional arguments of ``fields``, which are no options.
        base: the recipe that this one is a variant of.
    """

    fields: Callable[..., Fields]
    title: str
    arxiv: str
    without: Collection[str] = ()
    any_rule: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[Any, ...] = ()
    base: str | None = None

    @property
    def own(self) -> list[inspect.Parameter]:
        """The options of the decorated function."""
        parameters = inspect.signature(self.fields).parameters.values()
        return [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]

    @property
    def signature(self) -> inspect.Signature:
        """All options: the common ones, those of the decorated function, the update rule."""
        assert self.defaults.keys() <= COMMON.keys() - set(self.without), self.defaults
        common = [
            _parameter(name, kind, self.defaults.get(name, usual)) for name, (kind, usual) in COMMON.items() if name not in self.without
        ]
        rule = [_parameter(name, kind, usual) for name, (kind, usual) in RULE.items()] if self.any_rule else []
        return inspect.Signature([*common, *self.own, *rule], return_annotation="Method")

    def enter(self, named: Callable[..., Any]) -> Recipe:
        """Register it under the name and with the docstring of ``named``."""
        name, signature, own = named.__name__.replace("_", "-"), self.signature, [each.name for each in self.own]

        @functools.wraps(named)
        def make(**options: Any) -> Method:
            values = {each.name: options.get(each.name, each.default) for each in signature.parameters.values()}
            fields = self.fields(*self.fixed, **{option: values.pop(option) for option in own})
            if self.any_rule:
                values["update_rule_args"] = values["update_rule_args"] or {}
            return Method(name=name, title=self.title, arxiv=self.arxiv, **{**values, **fields})

        make.__signature__ = signature  # type: ignore[attr-defined]
        DEFINITIONS[name] = self
        return METHODS.register(make)


#: The definition of each recipe that was registered with a title.
DEFINITIONS: dict[str, Definition] = {}


@overload
def register(recipe: Recipe, /) -> Recipe: ...
@overload
def register(
    *, title: str, arxiv: str, without: Collection[str] = (), any_rule: bool = False, **defaults: Any
) -> Callable[[Callable[..., Fields]], Recipe]: ...
def register(
    recipe: Recipe | None = None,
    /,
    *,
    title: str = "",
    arxiv: str = "",
    without: Collection[str] = (),
    any_rule: bool = False,
    **defaults: Any,
) -> Any:
    """Enter a recipe under its function's name, with hyphens. Its keyword defaults are the method's defaults.

    As a bare decorator the function returns a whole :class:`Method` and takes only the options it names. With ``title`` and ``arxiv`` it
    returns the fields that differ from :class:`Method`'s defaults, and the options of :data:`COMMON` are added to its own; its positional
    parameters are no options, but what a :func:`variant` fixes.

    Args:
        recipe: the function, as a bare decorator.
        title, arxiv: of the method.
        without: common options that it does not take.
        any_rule: whether the update rule is an option too.
        defaults: of common options, where they differ.
    """
    if recipe is not None:
        return METHODS.register(recipe)
    return lambda fields: Definition(fields, title, arxiv, without, any_rule, defaults).enter(fields)


def variant(base: Recipe, *fixed: Any, title: str, arxiv: str, **defaults: Any) -> Callable[[Callable[[], None]], Recipe]:
    """Enter another recipe, its positional parameters fixed, under a name, title and docstring of its own.

    The decorated function is empty: it gives name and docstring.

    Args:
        base: the other recipe.
        fixed: its positional arguments.
        title, arxiv: of the variant.
        defaults: of common options, where they differ from the other recipe's.
    """
    name = base.__name__.replace("_", "-")
    definition = DEFINITIONS[name]
    merged = {**definition.defaults, **defaults}
    return dataclasses.replace(definition, title=title, arxiv=arxiv, fixed=fixed, base=name, defaults=merged).enter


def base_of(name: str) -> str | None:
    """The method that another is a :func:`variant` of; None if it is none."""
    return DEFINITIONS[name].base if name in DEFINITIONS else None


def _parameter(name: str, annotation: str, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
