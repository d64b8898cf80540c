"""docs/reference/python_api.md is what the docstrings say, and the names of every page exist."""

from __future__ import annotations

import importlib
import re

import pytest

import api_page
import zotune
from docs_pages import PAGES, name_of


def test_the_page_is_made_from_the_docstrings():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python tests/helpers/api_page.py"


def test_every_public_name_has_a_summary():
    assert not [line for line in api_page.page().splitlines() if line.startswith("| `") and line.endswith("|  |")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_dotted_name_of_a_page_exists(page):
    for name in sorted(set(re.findall(r"\bzotune(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))):
        assert resolves(name), f"{name_of(page)} names {name}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    item: object = zotune
    parts = name.split(".")
    for place, part in enumerate(parts[1:], 1):
        try:
            item = getattr(item, part)
        except AttributeError:
            try:
                item = importlib.import_module(".".join(parts[: place + 1]))
            except ImportError:
                return False
    return True
