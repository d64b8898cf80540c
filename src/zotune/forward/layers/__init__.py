"""Layer types, one file each: importing this package registers the rules of all of them (see ``rule``)."""

from __future__ import annotations

import importlib
import pkgutil

from zotune.forward.layers.rule import RULES, Example, LayerRule, register, rule_of

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = ["RULES", "Example", "LayerRule", "register", "rule_of"]
