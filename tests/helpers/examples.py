"""The scripts of examples/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from docs_pages import ROOT


def load(name: str) -> ModuleType:
    """The script of this name below examples/, run anew as a module."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
