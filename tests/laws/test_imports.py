"""No module imports itself through others, types included."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import paths

ROOT = paths.ROOT / "src"


def imports() -> dict[str, set[str]]:
    """Every module of the package, and those that it names in an import anywhere in its code."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in ROOT.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else node.module for name in names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in files}
        graph[module] = found
    return graph


def test_imports_have_no_circle():
    graph = imports()
    assert len(graph) > 200 and graph["zotune.optim.optimizer"]
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_root_holds_packages_and_four_modules():
    files = {file.name for file in (ROOT / "zotune").glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "errors.py", "registry.py"}


def test_files_are_at_most_400_lines():
    long = {str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py") if len(f.read_text(encoding="utf-8").splitlines()) > 400}
    assert not long
