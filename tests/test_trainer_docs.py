"""The examples of docs/trainer.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs/trainer.md"


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks[0], str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.split()
    assert float(printed[-1]) > 0.6  # the figure the example prints; a coin scores 0.5
    exec(compile(blocks[1], str(PAGE), "exec"), names)
    assert {path.name for path in Path("run").iterdir()} >= {"journal.zo", "checkpoint-60", "model.safetensors"}
    assert Path("run-error/journal.zo").is_file()
