"""The Python examples of docs/tutorial/first_run.md run, with fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_pages import DOCS, python_blocks

PAGE = DOCS / "tutorial/first_run.md"


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    blocks = python_blocks(PAGE)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    example = blocks[0]
    for written, fewer in (("max_steps=60", "max_steps=4"), ("eval_steps=30", "eval_steps=2"), ("save_steps=30", "save_steps=2")):
        assert written in example
        example = example.replace(written, fewer)
    exec(compile(example, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.split()
    assert float(printed[-1]) > 0.6  # the figure the example prints; a coin scores 0.5
    exec(compile(blocks[1], str(PAGE), "exec"), names)
    assert {path.name for path in Path("run").iterdir()} >= {"journal.zo", "checkpoint-4", "model.safetensors"}
    assert Path("run-error/journal.zo").is_file()
