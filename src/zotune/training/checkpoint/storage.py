"""TODO: folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

STATE_TENSORS = "zotune_state.safetensors"


STATE = "zotune_state.json"


BLOCK_TENSORS = "zotune_state-block-{}.safetensors"


SCHEDULER = "scheduler.json"


RNG = "rng_state.json"


TRAINER_STATE = "trainer_state.json"


ARGUMENTS = "training_args.json"


MANIFEST = "zotune_manifest.json"


_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)


_NAME = re.compile(r"checkpoint-(\d+)")


_DRAFT_SUFFIX = ".partial"


@contextmanager
def draft(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes when it raises.

    The files are on disk before the folder gets its name. An older `final` is replaced.
    """
    final = Path(final)
    folder = final.with_name(f".{final.name}{_DRAFT_SUFFIX}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        _sync_tree(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if final.exists():
        retired = final.with_name(f".{final.name}.replaced{_DRAFT_SUFFIX}")
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        folder.rename(final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        folder.rename(final)
    _sync(final.parent)


def remove_drafts(run_folder: str | os.PathLike[str]) -> None:
    """Delete what a killed save left behind."""
    for path in Path(run_folder).glob(f".*{_DRAFT_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checkpoints(run_folder: str | os.PathLike[str]) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, newest (largest N) first."""
    run_folder = Path(run_folder)
    found = [p for p in run_folder.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def problem(folder: str | os.PathLike[str], journal: str | os.PathLike[str]) -> str | None:
    """Why a run cannot go on from this checkpoint folder, in one sentence; None when it can.

    Args:
        folder: the checkpoint folder.
        journal: path of the run's journal.
    """
    folder, journal = Path(folder), Path(journal)
    if not folder.is_dir():
        return f"{folder} is not a checkpoint folder: pass the path of an existing checkpoint-N folder."
    if not any((folder / name).is_file() for name in _WEIGHTS) and not list(folder.glob("*/adapter_model.safetensors")):
        return f"{folder} holds no weights (none of {', '.join(_WEIGHTS)}): resume from another checkpoint."
    for name in (TRAINER_STATE, STATE, STATE_TENSORS, SCHEDULER, RNG):
        if not (folder / name).is_file():
            return (
                f"{folder} has no {name}, so the run cannot be continued exactly (was it saved with "
                "save_only_model=True?): resume from another checkpoint, or load its weights and start a new run."
            )
    damage = _damage(folder)
    if damage is not None:
        return f"{damage}: resume from another checkpoint."
    mark = load_json(folder / STATE)["journal"]
    if mark is None:
        return None
    if not journal.is_file():
        return f"{folder} belongs to a journal that is not at {journal}: set output_dir to the folder of that run."
    with journal.open("rb") as file:
        head = file.read(mark["bytes"])
    if len(head) < mark["bytes"]:
        return f"the journal {journal} ends before step {mark['steps']} of {folder}: resume from an earlier checkpoint."
    if hashlib.sha256(head).hexdigest() != mark["sha256"]:
        return f"{folder} was written by another run than the journal {journal}: resume from a checkpoint of this run."
    return None


def write_manifest(folder: Path) -> None:
    """Note the size and SHA-256 of every file of a checkpoint, in the last file that is written to it."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST}
    content = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    save_json(folder / MANIFEST, {"format": 1, "files": content})


def _damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written; None when all are."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder} has no {MANIFEST}, so nothing says that its files are whole"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{path} is damaged ({type(error).__name__})"
    for name, size, expected in listed:
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not _within(file, folder):
            return f"{path} is damaged (it names {name!r}, which is outside of the checkpoint)"
        if not file.is_file():
            return f"{folder} has no {name}, which its manifest lists"
        found = file.stat().st_size
        if found != size:
            return f"{file} is damaged ({found} bytes where {size} were written)"
        if _sha256(file) != expected:
            return f"{file} is damaged (its digest is not the one that was written)"
    missing = [name for name in (TRAINER_STATE, STATE, STATE_TENSORS, SCHEDULER, RNG) if name not in files]
    return f"{path} is damaged (it does not list {missing[0]})" if missing else None


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def journal_bytes(folder: str | os.PathLike[str]) -> int:
    """How much of its journal a checkpoint covers."""
    mark = load_json(Path(folder) / STATE)["journal"]
    return mark["bytes"] if mark else 0


def journal_mark(journal: str | os.PathLike[str], steps: int) -> dict[str, Any]:
    """What a checkpoint notes of its journal: steps, bytes and digest."""
    content = Path(journal).read_bytes()
    return {"steps": steps, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def save_json(path: Path, content: Any) -> None:
    """Write `content` as JSON (floats keep every bit)."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: resume from another checkpoint.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from None


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
