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
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            suggestion = did_you_mean_or(place, NAMES, "built in are")
            raise ValueError(f"there is no module {error.name!r} on the path or in {here}, for the reward {name!r}{suggestion}") from None
        raise ValueError(f"the module of the reward {name!r} needs {error.name!r}, which is not installed.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the module of the reward {name!r} cannot be imported: {error}") from error
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"the module of the reward {name!r} raised {type(error).__name__} when imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)


def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}, for the reward {name!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{str(path)!r} of the reward {name!r} needs {error.name!r}, which is not installed.") from None
    except Exception as error:  # a user's file may raise anything
        raise ValueError(f"{str(path)!r} of the reward {name!r} raised {type(error).__name__} when imported: {error}") from error
    return module
