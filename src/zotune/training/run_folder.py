"""The folder of a run: its files, whether it is in use, the command that resumes it.

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

from zotune.training.checkpoint.storage import other_format

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
    """Whether a folder holds (a part of) a run."""
    return any((folder / name).exists() for name in _RUN_MARKS) or any(folder.glob("checkpoint-*"))


def check_unused(folder: Path, command: str) -> None:
    """FileExistsError where a folder already holds a run; ValueError where it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder.")
    if holds_run(folder):
        raise FileExistsError(
            f"{folder} already holds a run: continue it with --resume_from_checkpoint true, choose another --output_dir, "
            f"or let {command} replace it with --overwrite_output_dir."
        )


def clear_run(folder: Path) -> None:
    """Deletes the files of a run, nothing else."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".*.partial"), folder / ADAPTER_FOLDER]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (*_RUN_MARKS, HISTORY_FILE, CURVE_FILE, HEAD_FILE, PROBE_FILE, "adapter_config.json", "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any]:
    """`zotune_run.json` of a run folder.

    Raises:
        FileNotFoundError: it does not exist. ValueError: it is damaged, or of another format.
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
    refused = other_format(folder, content.get("format"))
    if refused is not None:
        raise ValueError(refused)
    return content


def versions() -> dict[str, str]:
    """Versions of Python, zotune and the libraries."""
    found = {"python": platform.python_version()}
    for package in ("zotune", "torch", "transformers", "peft", "datasets", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resume_command(argv: Sequence[str]) -> str:
    """The command line that resumes a run started with these words after `zotune train`."""
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
    """Moves the files of a draft into a run folder, each atomically."""
    for path in sorted(draft.iterdir()):
        os.replace(path, folder / path.name)
    draft.rmdir()
