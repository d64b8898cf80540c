"""The Python of these pages of docs/ runs as it stands, from top to bottom."""

from __future__ import annotations

import pytest

from docs_pages import DOCS, python_blocks, save_files
from zotune.forward import layers
from zotune.methods.registry import METHODS

# Page, number of its blocks, what they print.
PAGES = [
    ("tutorial/own_data.md", 1, "loss"),
    ("tutorial/own_loop.md", 3, "tensor"),
    ("how-to/learning_rate.md", 1, "0.0"),
    ("how-to/lora_and_schemes.md", 1, "prompt_encoder"),
    ("how-to/big_models.md", 1, "stream through"),
    ("how-to/other_loops.md", 2, "bytes a client"),
    ("how-to/add_method.md", 2, "->"),
    ("how-to/add_layer_type.md", 2, "->"),
    ("how-to/add_loss.md", 2, "->"),
    ("how-to/add_engine.md", 1, "->"),
    ("how-to/add_task.md", 1, "('a joy . It was', (' bad', ' good'))"),
    ("reference/baselines.md", 1, "150"),
    ("reference/protocols.md", 1, "0.01 {'learning_rate': [0.0001, 5e-05]}"),
    ("reference/tasks.md", 1, ""),
    ("explanation/memory.md", 1, "GB"),
]


@pytest.fixture(autouse=True)
def registries_as_they_were():
    before = [(known, dict(known)) for known in (METHODS.recipes, layers.RULES)]
    yield
    for known, content in before:
        known.clear()
        known.update(content)


@pytest.mark.parametrize(("name", "count", "printed"), PAGES, ids=[name for name, _, _ in PAGES])
def test_a_page_runs_from_top_to_bottom(name, count, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / name
    save_files(page, tmp_path)
    blocks = python_blocks(page)
    assert len(blocks) == count
    exec(compile("\n".join(blocks), str(page), "exec"), {})
    assert printed in capsys.readouterr().out


def test_every_page_with_python_is_run_or_shows_a_fragment():
    run = {name for name, _, _ in PAGES} | {
        "tutorial/first_run.md",
        "how-to/data.md",
        "how-to/gguf.md",
        "how-to/rewards.md",
        "how-to/privacy.md",
    }
    fragments = {"how-to/several_machines.md", "how-to/export.md", "how-to/model_families.md"}
    found = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if python_blocks(page)}
    assert found == run | fragments


def test_adding_a_method_takes_no_more_than_30_lines():
    (block, *_) = python_blocks(DOCS / "how-to/add_method.md")
    assert len(block.splitlines()) <= 30


def test_methods_of_other_packages_are_found(tmp_path, monkeypatch):
    """Through the entry point that docs/how-to/add_method.md names; one that does not load is a warning."""
    (block, *_) = python_blocks(DOCS / "how-to/add_method.md")
    (tmp_path / "added_methods.py").write_text(block)
    info = tmp_path / "added-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zotune.methods]\nmine = added_methods\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    METHODS.forget_entry_points()
    with pytest.warns(UserWarning, match="no_such_module"):
        assert METHODS.get("lozo-normalized", rank=1).subspace.rank == 1
    assert "lozo-normalized" in METHODS.names()
    METHODS.forget_entry_points()
