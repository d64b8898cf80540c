"""The commands in README.md and docs/: every flag exists, and the blocks marked `<!-- runs -->` run, on a tiny model.

A marked block runs in a folder with `my-model` (and `my-masked`), `my.jsonl`, `train.jsonl`, `test.jsonl`, `data/sst2` and the files that
the page shows (see ``docs_pages``); training is cut to a few steps.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_cases import run_command, save_data, save_masked, save_model
from docs_pages import PAGES, ROOT, command_blocks, name_of, save_files
from zotune.cli.main import COMMANDS

BLOCKS = [block for page in PAGES for block in command_blocks(page)]


def _flags(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    words = [command, "--help-all" if command == "train" else "--help"]
    return set(re.findall(r"--\w+", run_command(capsys, *words).out)) | {"--help", "--help-all", "--traceback", "--config"}


def test_every_command_in_the_docs_exists_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    flags: dict[str, set[str]] = {}
    seen = 0
    for block in BLOCKS:
        for words in block.commands:
            where = f"{name_of(block.page)}: {shlex.join(words)}"
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), where
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), where
            words = _launched(words)
            if words[0] == "zotune" and not words[1].startswith("-"):
                assert words[1] in COMMANDS, where
                known = flags.setdefault(words[1], _flags(words[1], capsys))
                unknown = [w for w in words[2:] if w.startswith("--") and w.split("=")[0].replace("-", "_")[2:] not in _names(known)]
                assert not unknown, f"{where}: {unknown}"
            seen += 1
    assert seen >= 10


def _launched(words: list[str]) -> list[str]:
    """What a launcher of several processes starts."""
    return words[words.index("-m") + 1 :] if words[0] in ("torchrun", "accelerate") and "-m" in words else words


def _names(flags: set[str]) -> set[str]:
    return {flag[2:].replace("-", "_") for flag in flags}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark == "" for b in command_blocks(page))], ids=name_of)
def test_the_marked_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    if "./my-masked" in page.read_text(encoding="utf-8"):
        save_masked(tmp_path / "my-masked")
    for name in ("train", "test"):
        shutil.copy(tmp_path / "my.jsonl", tmp_path / f"{name}.jsonl")
    save_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in command_blocks(page):
        for words in block.commands if block.mark == "" else []:
            command = _launched(words)
            assert command[0] == "zotune", f"only zotune commands can be marked: {shlex.join(words)}"
            extra = ["--max_steps", "4"] if command[1] == "train" else []
            if command is not words:
                launch = [sys.executable, "-m", "torch.distributed.run", *words[1:], *extra]
                done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
                assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
                assert done.stdout.count("after training") == 1, "one of them speaks"
                continue
            # The tiny data have fewer rows than the sizes that a page may name.
            shrunk = ["--num_dev", "8"] if "--num_dev" in words else []
            result = run_command(capsys, *words[1:], *extra, *shrunk)
            assert result.code == 0, f"{shlex.join(words)}: {result.err}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_image_is_there_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (page.parent / image).is_file(), f"{name_of(page)} shows {image}"
    assert not re.findall(r"^[A-Z]{4,}\.?$", text, re.MULTILINE), "a line that is a word in capitals"
