"""Submodules that are imported when they are first read as attributes of their package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def submodules(package: str, *names: str) -> Callable[[str], ModuleType]:
    """A ``__getattr__`` for ``package`` that imports the submodules ``names``, so that ``import zotune`` suffices to name them."""

    def get(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
