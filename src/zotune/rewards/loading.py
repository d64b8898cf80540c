"""Reward functions by name: built-in, or ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from zotune.io.suggest import did_you_mean_or
from zotune.io.text import shortened
from zotune.rewards.builtin import NAMES, builtin
from zotune.rewards.calls import RewardFunction


def is_code(name: str) -> bool:
    """Whether a name is that of a module's or a file's function, which runs code of its author; not a built-in one's."""
    return name.partition(":")[0] not in NAMES


def load(name: str) -> RewardFunction:
    """The reward function of a name.

    Args:
        name: ``module:function`` of a module on ``sys.path`` or in the current directory, ``path/file.py:function``, or a built-in
            function, which comes first: ``exact_match``, ``token_f1``, ``bleu`` or ``math_verify`` (``:COLUMN`` of the right answer, by
            default "reference", "answer", "solution" or "label"), ``contains:TEXT``, ``regex:PATTERN``, ``length:TOKENS``,
            ``characters:NUMBER``.

    Raises:
        ValueError: there is no such function, module, file or attribute, or it is not callable.
    """
    found = builtin(name)
    if found is not None:
        return found
    place, colon, attributes = name.rpartition(":")
    if not colon or not place or not attributes:
        otherwise = "a function of your own is `module:function` or `file.py:function`; built in are"
        raise ValueError(f"unknown reward function {name!r}{did_you_mean_or(name.partition(':')[0], NAMES, otherwise)}")
    function: Any = _from_file(Path(place), name) if place.endswith(".py") else _from_path(place, name)
    for attribute in attributes.split("."):
        if not hasattr(function, attribute):
            near = did_you_mean_or(attribute, [each for each in dir(function) if not each.startswith("_")], "it defines")
            raise ValueError(f"{place!r} has no {attributes!r}, which the reward {name!r} names{shortened(near, 300)}")
        function = getattr(function, attribute)
    if not callable(function):
        raise ValueError(f"the reward {name!r} must be a function, and it is of type {type(function).__name__}.")
    return function


def _from_path(place: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
            suggestion = did_you_mean_or(place, NAMES, "built in are")
            raise ValueError(f"there is no module {error.name!r} on the path or in {here}, for the reward {name!r}{suggestion}") from None
        raise _not_imported(place, name, error) from error
    finally:
        if added:
            sys.path.remove(here)


def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}, for the reward {name!r}.")
    key = str(path.resolve())
    if key in sys.modules:  # two functions of a file share its state
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[key]
        if isinstance(error, Exception | SystemExit):  # a user's file may raise anything
            raise _not_imported(str(path), name, error) from error
        raise
    return module


def _not_imported(place: str, name: str, error: BaseException) -> ValueError:
    if isinstance(error, ModuleNotFoundError):
        return ValueError(f"{place!r} of the reward {name!r} needs {error.name!r}, which is not installed.")
    return ValueError(f"{place!r} of the reward {name!r} raised {type(error).__name__} when imported: {error}")
