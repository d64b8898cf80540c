"""docs/how-to/big_models.md has the table that its script prints."""

from __future__ import annotations

import runpy

from docs_pages import DOCS, ROOT


def test_the_table_is_the_scripts():
    table = runpy.run_path(str(ROOT / "benchmarks" / "big_models.py"))["table"]()
    assert table in (DOCS / "how-to/big_models.md").read_text(encoding="utf-8")
