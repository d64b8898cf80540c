"""docs/how-to/rewards.md, followed from top to bottom in an empty folder, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_cases import run_command
from docs_pages import DOCS, command_blocks, python_blocks, save_files

PAGE = DOCS / "how-to/rewards.md"


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    save_files(PAGE, tmp_path)
    (copy,) = re.findall(r"^\$ (cp .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-c", copy], check=True, timeout=100)
    commands = [words for block in command_blocks(PAGE) if block.mark == "rewards" for words in block.commands][1:]
    said = []
    for words in commands:
        assert words[0] == "zotune"
        result = run_command(capsys, *words[1:], *(["--max_steps", "2", "--eval_steps", "2"] if words[1] == "train" else []))
        assert result.code == 0, result.err
        said.append(result.out)
    assert "completion" in said[0] and "reward" in said[-1]
    assert {"reward", "completion_length"} <= json.loads(Path("run/summary.json").read_text())["after"].keys()
    assert Path("run/completions.jsonl").read_text().count("\n") >= 4
    exec(compile("\n".join(python_blocks(PAGE)), str(PAGE), "exec"), {})
