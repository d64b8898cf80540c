"""The folder of a run: claiming it, what it says about the run, how to resume it.

journal.zo  zotune_run.json  summary.json  history.json  curve.png  checkpoint-N/  and the trained model with its tokenizer
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zotune.io.json_files import write_json

RUN_FILE = "zotune_run.json"
SUMMARY_FILE = "summary.json"
HISTORY_FILE = "history.json"
CURVE_FILE = "curve.png"
JOURNAL_FILE = "journal.zo"
ADAPTER_FOLDER = "initial_adapter"
HEAD_FILE = "initial_head.safetensors"
PROBE_FILE = "linear_probe.safetensors"

_RUN_MARKS = (RUN_FILE, JOURNAL_FILE, SUMMARY_FILE, "model.safetensors", "adapter_model.safetensors", "config.json")


def holds_run(folder: Path) -> bool:
    """Whether there is (a part of) a run in a folder."""
    return any((folder / name).exists() for name in _RUN_MARKS) or any(folder.glob("checkpoint-*"))


def check_unused(folder: Path, command: str) -> None:
    """FileExistsError when a folder already holds a run, naming the ways out; ValueError when it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder.")
    if holds_run(folder):
        raise FileExistsError(
            f"{folder} already holds a run: continue it with --resume_from_checkpoint true, choose another --output_dir, "
            f"or let {command} replace it with --overwrite_output_dir."
        )


def clear_run(folder: Path) -> None:
    """Removes a run from a folder: what we write there, nothing else."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".*.partial"), folder / ADAPTER_FOLDER]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (*_RUN_MARKS, HISTORY_FILE, CURVE_FILE, HEAD_FILE, PROBE_FILE, "adapter_config.json", "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any]:
    """`zotune_run.json` of a run folder.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {RUN_FILE} in {folder}: it is not the folder of a `zotune train` run.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    return content


def write_run(folder: Path, content: dict[str, Any]) -> None:
    """Writes `zotune_run.json`, whole or not at all."""
    write_json(folder / RUN_FILE, content)


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for package in ("zotune", "torch", "transformers", "peft", "datasets", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resume_command(argv: Sequence[str]) -> str:
    """The command line that continues a run that was started with these words after `zotune train`."""
    words: list[str] = []
    skip = False
    for word in argv:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word in ("--resume_from_checkpoint", "--overwrite_output_dir")
        if not skip and not word.startswith(("--resume_from_checkpoint=", "--overwrite_output_dir=")):
            words.append(word)
    return shlex.join(["zotune", "train", *words, "--resume_from_checkpoint", "true"])


def publish(draft: Path, folder: Path) -> None:
    """Moves the files of a finished draft into a run folder, each in one step."""
    for path in sorted(draft.iterdir()):
        os.replace(path, folder / path.name)
    draft.rmdir()
