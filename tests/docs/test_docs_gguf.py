"""docs/how-to/gguf.md, followed from top to bottom in an empty folder: its quickstart as it stands, the rest with fewer steps and rows.

Commands of programs that are not here (pip, Ollama, llama.cpp's own) are not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zotune
from command_cases import run_command
from docs_pages import DOCS, command_blocks, python_blocks, save_files

PAGE = DOCS / "how-to/gguf.md"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason="the page trains in llama.cpp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    save_files(PAGE, tmp_path)
    quickstart, *others = [block.commands for block in command_blocks(PAGE) if block.mark == "with llama.cpp"]

    (copy,) = re.findall(r"^\$ (cp .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-c", copy], check=True, timeout=100)
    said = [_run(capsys, words) for words in quickstart[1:]]
    _check_figures(said[-1])
    adapter = Path("run/adapter.gguf").read_bytes()

    _save_with_chat_template(tmp_path / "chatty")
    _run(capsys, ["zotune", "convert", "chatty", "model.gguf"])
    for words in (words for block in others for words in block):
        again = "--resume_from_checkpoint" in words
        steps = ["--max_steps", "4"] if words[1] == "train" and not again else []
        rows = ["--num_eval", "8"] if "--eval_file" in words else []
        _run(capsys, words, *steps, *rows)
    assert Path("rebuilt/adapter.gguf").read_bytes() == adapter
    assert Path("run/adapter.gguf").read_bytes() == adapter, "the run had ended when it was resumed"
    assert Path("run/Modelfile").read_text().splitlines()[1:3] == [f"FROM {tmp_path.resolve() / 'tiny.gguf'}", "ADAPTER ./adapter.gguf"]

    templates = ["TEMPLATE" in Path(f"runs/{run}/Modelfile").read_text() for run in ("answers", "chats")]
    assert templates == [True, False], "chats go through the template of the model's file"

    blocks = python_blocks(PAGE)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("loss") == 2 and "answer" in printed
    for name, adapter in (("tiny.gguf", "adapter.gguf"), ("run", None)):
        assert zotune.load_gguf(name, adapter=adapter)[0].factors(), "as the page says"


def _run(capsys: pytest.CaptureFixture[str], words: list[str], *more: str) -> str:
    assert words[0] == "zotune", shlex.join(words)
    result = run_command(capsys, *words[1:], *more)
    assert result.code == 0, f"{shlex.join(words)}: {result.err}"
    return result.out


def _check_figures(evaluated: str) -> None:
    """Accuracy rises as the page says; other processors round otherwise, and end near its figure."""
    summary = json.loads(Path("run/summary.json").read_text())
    before, after = (100 * summary[when]["accuracy"] for when in ("before", "after"))
    stated = re.search(r"rises from ([\d.]+) to ([\d.]+) %", PAGE.read_text(encoding="utf-8"))
    assert stated is not None
    assert before == pytest.approx(float(stated[1]), abs=1)
    assert after == pytest.approx(float(stated[2]), abs=4)
    assert after > before + 2
    assert f"{after:.1f} %" in evaluated


def _save_with_chat_template(folder: Path) -> None:
    """The bundled model as a chat model."""
    shutil.copytree("bundled/tiny-lm", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
