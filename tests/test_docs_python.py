"""The code of these pages of docs/ runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zotune.methods import registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Page, number of its blocks, what they print.
PAGES = [
    ("python.md", 3, "tensor"),
    ("learning-rate.md", 1, "0.0"),
    ("schemes.md", 1, "prompt_encoder"),
    ("rivals.md", 1, "150"),
    ("big_models.md", 1, "come and go"),
    ("extend.md", 2, "->"),
]


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(registry._RECIPES)
    yield
    registry._RECIPES.clear()
    registry._RECIPES.update(before)


@pytest.mark.parametrize(("name", "count", "printed"), PAGES)
def test_a_page_runs_from_top_to_bottom(name, count, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == count
    exec(compile("\n".join(blocks), str(page), "exec"), {})
    assert printed in capsys.readouterr().out


def test_adding_a_method_takes_no_more_than_30_lines():
    (block, *_) = re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text(), flags=re.DOTALL)
    assert len(block.splitlines()) <= 30


def test_methods_of_other_packages_are_found(tmp_path, monkeypatch):
    """Through the entry point that docs/extend.md names; one that does not load is a warning."""
    (block, *_) = re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text(), flags=re.DOTALL)
    (tmp_path / "added_methods.py").write_text(block)
    info = tmp_path / "added-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zotune.methods]\nmine = added_methods\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._load_others.cache_clear()
    with pytest.warns(UserWarning, match="no_such_module"):
        assert registry.get("lozo-normalised", rank=1).subspace.rank == 1
    assert "lozo-normalised" in registry.names()
    registry._load_others.cache_clear()
