"""docs/reference/python_api.md is what the docstrings say."""

from __future__ import annotations

import api_page


def test_the_page_is_made_from_the_docstrings():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python tests/helpers/api_page.py"


def test_every_public_name_has_a_summary():
    assert not [line for line in api_page.page().splitlines() if line.startswith("| `") and line.endswith("|  |")]
