"""docs/reference/tasks.md on the data of the tables: its commands run, and its digests are those of the files."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

import hub_folders
from command_cases import run_command
from docs_pages import DOCS, command_blocks
from zotune import tasks
from zotune.tasks.fetch import digest

PAGE = DOCS / "reference/tasks.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (\d+) \| [\d,]+ \| [^|]+ \| `(\w{16})` \|$", re.MULTILINE)


def test_the_digests_are_those_of_the_tables_files(data_dir):
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) == 8
    for name, split, count, expected in found:
        task = tasks.load(name)
        rows = tasks.load_rows(task, split, data_dir)
        assert (len(rows), digest(task, rows)) == (int(count), expected), (name, split)


def test_the_commands_write_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    commands = [words for block in command_blocks(PAGE) for words in block.commands if "--fetch" in words]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for words in commands:
        task = tasks.load(words[words.index("--fetch") + 1])
        rows = [{column: f"{column} {i}" for column in task.columns} | {task.label_column: task.labels[i % 2]} for i in range(3)]
        hub_folders.save(tmp_path, task, {task.splits["train"]: rows, task.splits["eval"]: rows[:2]})
        assert run_command(capsys, *words[1:]).code == 0
        assert [len(tasks.load_rows(task, split, "data")) for split in ("train", "eval")] == [3, 2]
