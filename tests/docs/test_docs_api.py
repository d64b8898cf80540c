"""docs/reference/python_api.md is what the docstrings say, and the names of every page exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import api_page
from docs_pages import PAGES, name_of, site_hooks

DOTTED = r"\bzotune(?:\.[A-Za-z_]\w*)+"


def test_the_page_is_made_from_the_docstrings():
    pytest.importorskip("gguf", reason="the page lists what reads GGUF files")
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python tests/helpers/api_page.py"


def test_the_site_shows_every_public_name():
    pytest.importorskip("gguf", reason="the page lists what reads GGUF files")
    names = {module: [name for name, _ in api_page.public(importlib.import_module(module))] for module in api_page.MODULES}
    assert {module: sorted(found) for module, found in site_hooks().api_names().items()} == {
        module: sorted(found) for module, found in names.items()
    }


def test_every_public_name_has_a_summary():
    pytest.importorskip("gguf", reason="the page lists what reads GGUF files")
    assert not [line for line in api_page.page().splitlines() if line.startswith("| `") and line.endswith("|  |")]


def test_every_dotted_name_of_a_page_is_an_attribute():
    """After `import zotune` alone, in a process that has imported nothing else."""
    names = {name: name_of(page) for page in PAGES for name in re.findall(DOTTED, page.read_text(encoding="utf-8"))}
    assert len(names) > 30
    code = "import functools, sys, zotune\nfor name in sys.argv[1:]: functools.reduce(getattr, name.split('.')[1:], zotune)"
    done = subprocess.run([sys.executable, "-c", code, *sorted(names)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-300:]
