"""docs/reference/methods.md has the registry's table, and the README names every method."""

from __future__ import annotations

import methods_page
from docs_pages import ROOT
from zotune import methods


def test_the_table_is_the_registrys():
    _, found, _ = methods_page.split()
    assert found == methods_page.table(), "run: python tests/helpers/methods_page.py"


def test_the_readme_names_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in methods.names() if f"`{name}`" not in readme]
