"""docs/how-to/privacy.md, followed from top to bottom in an empty folder, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_cases import run_command
from docs_pages import DOCS, command_blocks, python_blocks

PAGE = DOCS / "how-to/privacy.md"


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (copy,) = re.findall(r"^\$ (cp .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-c", copy], check=True, timeout=100)
    commands = [words for block in command_blocks(PAGE) if block.mark == "privacy" for words in block.commands][1:]
    assert [words[1] for words in commands] == ["train", "replay"]
    for words in commands:
        short = ["--max_steps", "2", "--num_eval", "8"] if words[1] == "train" else []
        result = run_command(capsys, *words[1:], *short)
        assert result.code == 0, result.err
    assert 3.9 < json.loads(Path("run/summary.json").read_text())["privacy"]["epsilon"] <= 4
    exec(compile("\n".join(python_blocks(PAGE)), str(PAGE), "exec"), {})
