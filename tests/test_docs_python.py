"""The code of these pages of docs/ runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Page, number of its blocks, what they print.
PAGES = [
    ("python.md", 3, "tensor"),
    ("learning-rate.md", 1, "0.0"),
    ("schemes.md", 1, "prompt_encoder"),
    ("rivals.md", 1, "150"),
    ("big_models.md", 1, "come and go"),
]


@pytest.mark.parametrize(("name", "count", "printed"), PAGES)
def test_a_page_runs_from_top_to_bottom(name, count, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == count
    exec(compile("\n".join(blocks), str(page), "exec"), {})
    assert printed in capsys.readouterr().out
