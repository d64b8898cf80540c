"""docs/methods.md has the registry's table."""

from __future__ import annotations

import methods_page


def test_the_table_is_the_registrys():
    _, found, _ = methods_page.split()
    assert found == methods_page.table(), "run: python tests/methods_page.py"
