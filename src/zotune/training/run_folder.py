"""The folder of a run: what it is (:class:`Kind`), how `zotune train` starts in it, its files, the command that resumes it.

journal.zo  zotune_run.json  summary.json  history.json  curve.png  checkpoint-N/  and the trained model with its tokenizer; of rewards
also completions.jsonl, of rows with a label task.yaml
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import shutil
from collections.abc import Iterable, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zotune.io.atomic import sync
from zotune.io.json_files import write_json
from zotune.optim.distributed.launch import LAUNCH_FILE
from zotune.training import run_file
from zotune.training.checkpoint import storage
from zotune.training.checkpoint.files import GGUF_ADAPTER, GGUF_SOURCE, MODELFILE
from zotune.training.checkpoint.storage import other_format
from zotune.training.completions import COMPLETIONS_FILE
from zotune.training.predictions import PREDICTIONS_FILE

logger = logging.getLogger(__name__)

RUN_FILE = "zotune_run.json"
SUMMARY_FILE = "summary.json"
HISTORY_FILE = "history.json"
CURVE_FILE = "curve.png"
JOURNAL_FILE = "journal.zo"
ADAPTER_FOLDER = "initial_adapter"
HEAD_FILE = "initial_head.safetensors"
PROBE_FILE = "linear_probe.safetensors"
ROWS_FILE = "attributed_rows.jsonl"
#: The task that was made of rows with a label.
TASK_FILE = "task.yaml"
#: The key of a private run, which is never published.
PRIVATE_KEY = "_private/noise.key"

#: Names that a run gives to files in its folder; where no run has, they are somebody else's.
_OWN_FILES = (
    JOURNAL_FILE, SUMMARY_FILE, HISTORY_FILE, CURVE_FILE, HEAD_FILE, PROBE_FILE, LAUNCH_FILE, COMPLETIONS_FILE, ROWS_FILE, TASK_FILE,
    PRIVATE_KEY, PREDICTIONS_FILE,
)  # fmt: skip
_NAMES_OF_A_MODEL = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    GGUF_ADAPTER,
    MODELFILE,
    GGUF_SOURCE,
)
_CLEARED = "cleared"


class Kind(Enum):
    """What a folder is."""

    UNUSED = "no run"
    BEGUN = "a run that has kept no step"
    KEPT = "a run"
    ENDED = "a run that has ended and kept no step to continue from"
    TRAINER = "a run of ZOTrainer"
    FOREIGN = "files that no run of this zotune wrote"


def kind_of(folder: Path) -> Kind:
    """What a folder is.

    A run writes `zotune_run.json` before all else. Until there is a journal or a checkpoint, none of its steps is kept. A run that is being
    deleted has kept none from the first moment on.
    """
    if (folder / RUN_FILE).is_file():
        if _is_cleared(folder):
            return Kind.BEGUN
        if keeps_steps(folder):
            return Kind.KEPT
        return Kind.ENDED if (folder / SUMMARY_FILE).exists() else Kind.BEGUN
    if keeps_steps(folder):
        return Kind.TRAINER
    return Kind.FOREIGN if _foreign(folder) else Kind.UNUSED


def keeps_steps(folder: Path) -> bool:
    """Whether a folder has a journal, or a checkpoint of zotune."""
    own = any((path / storage.MANIFEST).is_file() for path in storage.checkpoints(folder))
    return own or (folder / JOURNAL_FILE).is_file()


def start_in(folder: Path, wanted: str | None, *, overwrite: bool, restarted: bool) -> tuple[str | bool | None, bool]:
    """How `zotune train` starts in a folder: the one rule for it.

    Args:
        wanted: `--resume_from_checkpoint`.
        overwrite: `--overwrite_output_dir`.
        restarted: an earlier attempt of this launch began, or resumed, the run in the folder.

    Returns:
        What to resume from (True: the newest checkpoint and the journal; a checkpoint; None: a new run), and whether to clear the folder.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: refused; the message says what can be done.
    """
    resume = None if wanted is None or wanted.lower() in ("false", "no") else True if wanted.lower() in ("true", "yes") else wanted
    if resume and overwrite:
        raise ValueError("--resume_from_checkpoint continues the run that --overwrite_output_dir deletes: give one of them.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder.")
    kind = kind_of(folder)
    if kind is Kind.FOREIGN:
        raise FileExistsError(
            f"{folder} holds files that no run of this zotune wrote and that a run would overwrite ({', '.join(_foreign(folder)[:3])}): "
            "choose another --output_dir."
        )
    if restarted and kind in (Kind.KEPT, Kind.ENDED):
        return (True, False) if kind is Kind.KEPT else (None, True)
    if overwrite or (kind is Kind.BEGUN and resume in (None, True)):
        return None, kind is not Kind.UNUSED
    if resume is None:
        if kind is Kind.UNUSED:
            return None, False
        on = {
            Kind.KEPT: "continue it with --resume_from_checkpoint true, ",
            Kind.TRAINER: "continue it with trainer.train(resume_from_checkpoint=True), ",
        }.get(kind, "")
        raise FileExistsError(
            f"{folder} already holds {kind.value}: {on}choose another --output_dir, or let zotune train replace it with "
            "--overwrite_output_dir."
        )
    if kind is Kind.UNUSED:
        raise FileNotFoundError(f"there is no {RUN_FILE} in {folder}, so no run to continue: start one without --resume_from_checkpoint.")
    if kind is Kind.ENDED:
        raise ValueError(f"{folder} holds {kind.value}: choose another --output_dir, or replace it with --overwrite_output_dir.")
    read_run(folder)
    return resume, False


def check_sources(folder: Path, sources: Iterable[str | os.PathLike[str] | None]) -> None:
    """ValueError where a file or folder that a run reads is among those that it deletes or replaces in its own folder."""
    doomed = {path.resolve() for path in run_files(folder)}
    places = doomed | {path.parent for path in doomed} | {folder.resolve()}
    for source in sources:
        if source is not None and Path(source).expanduser().resolve() in places:
            raise ValueError(
                f"{source} is among the files of the run in --output_dir {folder}, which this run deletes or replaces: choose another "
                "--output_dir, or copy them elsewhere."
            )


def run_files(folder: Path) -> list[Path]:
    """The files of a run without `zotune_run.json`: those of its own names, and those that a manifest names."""
    found = [path for name in _OWN_FILES if (path := folder / name).is_file()]
    for place in (folder, folder / ADAPTER_FOLDER, *storage.checkpoints(folder)):
        found += storage.named_files(place)
    return found


def clear_run(folder: Path) -> None:
    """Deletes the files of a run, nothing else.

    From the first moment on the folder holds a run that has kept nothing (:func:`kind_of`), wherever the deletion is cut off.
    """
    write_json(folder / RUN_FILE, {"format": storage.FORMAT, _CLEARED: True})
    for place in (folder / ADAPTER_FOLDER, *storage.checkpoints(folder)):
        storage.delete_named(place)
    for path in run_files(folder):
        path.unlink(missing_ok=True)
    secret = (folder / PRIVATE_KEY).parent
    if secret.is_dir() and not any(secret.iterdir()):
        secret.rmdir()
    storage.remove_drafts(folder)
    (folder / RUN_FILE).unlink()


def _foreign(folder: Path) -> list[str]:
    """Names of files in a folder without a run that a run would overwrite."""
    names = (*_OWN_FILES, ADAPTER_FOLDER, *_NAMES_OF_A_MODEL)
    return [name for name in names if name != LAUNCH_FILE and (folder / name).exists()] + [p.name for p in storage.checkpoints(folder)]


def _is_cleared(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get(_CLEARED))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # damaged: read_run says so


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
    if content.get(_CLEARED):
        raise FileNotFoundError(f"the run in {folder} was being deleted when its process ended: start a run in it with `zotune train`.")
    refused = other_format(folder, content.get("format"))
    if refused is not None:
        raise ValueError(refused)
    run_file.parsed(content, path)
    return content


def adapter_facts(optimizer: Any) -> dict[str, Any]:
    """What a GGUF adapter says of the run that made it; equal for the run and its replay."""
    return {"method": optimizer.method.name, "seed": optimizer.seed, "steps": optimizer.steps}


def versions() -> dict[str, str]:
    """Versions of Python, zotune and the libraries."""
    found = {"python": platform.python_version()}
    for package in ("zotune", "torch", "transformers", "peft", "datasets", "safetensors", "gguf", "llama-cpp-python"):
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
    """Moves the files of a draft into a run folder, each atomically: the manifest first, then no file of an earlier model is left.

    A file of the same name that no manifest of the run names was there before it: it is kept as `NAME.before`.
    """
    storage.write_manifest(draft)
    files = [path.relative_to(draft) for path in sorted(draft.rglob("*")) if path.is_file() and path != draft / storage.MANIFEST]
    own = storage.named_files(folder)
    for path in (folder / name for name in files):
        if path.exists() and path not in own:
            aside = path.with_name(f"{path.name}.before")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.before")
            logger.warning("%s was there before the run; it is kept as %s.", path, aside.name)
            os.replace(path, aside)
    for name in files:
        sync(draft / name)
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / SUMMARY_FILE).unlink(missing_ok=True)  # it stands for a whole model
    os.replace(draft / storage.MANIFEST, folder / storage.MANIFEST)
    for path in own[:-1]:
        path.unlink(missing_ok=True)
    for name in files:
        os.replace(draft / name, folder / name)
    shutil.rmtree(draft)
    sync(folder)
