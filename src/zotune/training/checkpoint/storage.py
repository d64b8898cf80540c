"""Checkpoint folders: written whole or not at all, found by their numbers, checked before a run resumes.

A checkpoint is written beside its final place, synced to disk and renamed last. Its manifest lists the size and digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zotune.io.atomic import sync
from zotune.io.inside import indexed_files, inside
from zotune.training.checkpoint import schema
from zotune.training.checkpoint.files import (
    ARGUMENTS as ARGUMENTS,
)
from zotune.training.checkpoint.files import (
    FORMAT,
    GGUF_ADAPTER,
    MANIFEST,
    RNG,
    SCHEDULER,
    STATE,
    STATE_TENSORS,
    TRAINER_STATE,
    WEIGHTS_INDEX,
    other_format,
    save_json,
)
from zotune.training.checkpoint.files import (
    load_json as load_json,
)

_WEIGHTS = ("model.safetensors", WEIGHTS_INDEX, "adapter_model.safetensors", GGUF_ADAPTER)
_RESUMED = (TRAINER_STATE, STATE, STATE_TENSORS, SCHEDULER, RNG)  # a run cannot resume without them
_NAME = re.compile(r"checkpoint-(\d+)")
_DRAFT_SUFFIX = ".partial"
_PIECE = 1 << 20  # bytes of a file that are hashed at a time
_REPLACED, _DELETED = f".replaced{_DRAFT_SUFFIX}", f".deleted{_DRAFT_SUFFIX}"
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+|initial_adapter|(model|zotune_\w+|summary|history|journal|curve|initial_head|linear_probe)(\.\w+)?)(\.replaced|\.deleted)?\.partial"
)


@contextmanager
def draft(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder, renamed to ``final`` when the block ends well and deleted when it raises.

    An older ``final`` is replaced; files in it that its manifest does not name are kept.
    """
    final = Path(final)
    folder = final.with_name(f".{final.name}{_DRAFT_SUFFIX}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            sync(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if final.exists():
        retired = final.with_name(f".{final.name}{_REPLACED}")
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        folder.rename(final)
        _finish_replacement(retired, final)
    else:
        folder.rename(final)
    sync(final.parent)


def _finish_replacement(retired: Path, final: Path) -> None:
    """Deletes a folder that ``final`` has replaced, but for files that no manifest names: they move to ``final``."""
    for path in named_files(retired):
        path.unlink(missing_ok=True)
    for path in retired.iterdir():
        if not (final / path.name).exists() and (path.is_file() or any(each.is_file() for each in path.rglob("*"))):
            path.rename(final / path.name)
    shutil.rmtree(retired, ignore_errors=True)


def delete(folder: Path) -> None:
    """Deletes a checkpoint: it vanishes at once, also where the deletion is cut off."""
    doomed = folder.with_name(f".{folder.name}{_DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(run_folder: Path, limit: int | None, newest: Path, best: str | os.PathLike[str] | None) -> None:
    """Deletes checkpoints beyond ``limit``: first those of later steps, which a run that went back has left behind, then the oldest.

    Args:
        limit: how many stay; None or 0: all.
        newest: was written last; it stays, as does ``best``.
    """
    if not limit or limit < 0:
        return
    step = _number(newest)
    own = [path for path in checkpoints(run_folder) if (path / MANIFEST).is_file()]
    found = sorted(own, key=lambda path: (_number(path) <= step, _number(path)))
    kept = {newest.name} | ({Path(best).name} if best else set())
    spare = [path for path in found if path.name not in kept]
    for path in spare[: max(0, len(found) - max(limit, len(found) - len(spare)))]:
        delete(path)


def leftovers(run_folder: str | os.PathLike[str]) -> list[Path]:
    """What an interrupted save or deletion of a run has left."""
    return sorted(path for path in Path(run_folder).glob(f".*{_DRAFT_SUFFIX}") if _LEFTOVER.fullmatch(path.name))


def remove_drafts(run_folder: str | os.PathLike[str]) -> None:
    """Deletes the leftovers of an interrupted save or deletion; a checkpoint that was being replaced comes back."""
    for path in leftovers(run_folder):
        final = path.with_name(path.name[1:].removesuffix(_REPLACED))
        if path.name.endswith(_REPLACED) and path.is_dir():
            if final.exists():
                _finish_replacement(path, final)
            else:
                path.rename(final)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checkpoints(run_folder: str | os.PathLike[str]) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, newest (largest N) first; a folder without any file of a checkpoint is none."""
    found = [p for p in Path(run_folder).glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    found = [p for p in found if any((p / name).exists() for name in (MANIFEST, *_WEIGHTS, *_RESUMED))]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def named_files(folder: Path) -> list[Path]:
    """The files of a folder that its manifest names, and the manifest last; none without a readable manifest."""
    try:
        names = list(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        found = [inside(folder, name, folder / MANIFEST, follow=True) for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [*(path for path in found if path.is_file()), folder / MANIFEST]


def delete_named(folder: Path) -> None:
    """Deletes the files that a folder's manifest names, and then the folder, if nothing else is in it."""
    for path in named_files(folder):
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if not parent.is_relative_to(folder) or any(parent.iterdir()):
                break
            parent.rmdir()


def problem(folder: str | os.PathLike[str], journal: str | os.PathLike[str]) -> str | None:
    """Why a run with this journal cannot resume from a checkpoint folder, in one sentence; None when it can."""
    folder, journal = Path(folder), Path(journal)
    if not folder.is_dir():
        return f"{folder} is not a checkpoint folder: pass the path of an existing checkpoint-N folder."
    if not any((folder / name).is_file() for name in _WEIGHTS) and not list(folder.glob("*/adapter_model.safetensors")):
        return f"{folder} holds no weights (none of {', '.join(_WEIGHTS)}): resume from another checkpoint."
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder} has no {MANIFEST}, so nothing says that its files are whole: resume from another checkpoint."
    try:
        format_of, files = _read_manifest(path)
    except ValueError as error:
        return f"{error}: resume from another checkpoint."
    refused = other_format(folder, format_of)
    if refused is not None:
        return refused
    for name in _RESUMED:
        if not (folder / name).is_file():
            return (
                f"{folder} has no {name}, so the run cannot be continued exactly (was it saved with "
                "save_only_model=True?): resume from another checkpoint, or load its weights and start a new run."
            )
    try:
        fault = _damage(folder, files) or next((f"{path} is damaged (it does not list {n})" for n in _RESUMED if n not in files), None)
        check_index(folder)
    except ValueError as error:
        fault = str(error).rstrip(".")
    if fault is not None:
        return f"{fault}: resume from another checkpoint."
    try:
        schema.check(folder)
    except ValueError as error:
        return str(error)
    mark = schema.state_of(folder).journal
    if mark is None:
        return None
    if not journal.is_file():
        return f"{folder} belongs to a journal that is not at {journal}: set output_dir to the folder of that run."
    if journal.stat().st_size < mark.bytes:
        return f"the journal {journal} ends before step {mark.steps} of {folder}: resume from an earlier checkpoint."
    if _sha256(journal, mark.bytes) != mark.sha256:
        return f"{folder} was written by another run than the journal {journal}: resume from a checkpoint of this run."
    return None


def check_index(folder: Path) -> None:
    """ValueError where a checkpoint's index of weights is damaged, or names files that are not in the checkpoint."""
    index = folder / WEIGHTS_INDEX
    for path in indexed_files(index) if index.is_file() else ():
        inside(folder, path.relative_to(folder).as_posix(), index, follow=True)
        if not path.is_file():
            raise ValueError(f"{index} is damaged: it names {path.name!r}, which {folder} does not have.")


def write_manifest(folder: Path) -> None:
    """Lists the size and SHA-256 of every file of a checkpoint; the last file to be written."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST}
    content = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    save_json(folder / MANIFEST, {"format": FORMAT, "files": content})


def _damage(folder: Path, files: dict[str, tuple[int, str]]) -> str | None:
    """Which file differs from its (bytes, digest) in the manifest; None when none does."""
    for name, (size, digest) in files.items():
        file = inside(folder, name, folder / MANIFEST, follow=True)
        if not file.is_file():
            return f"{folder} has no {name}, which its manifest lists"
        found = file.stat().st_size
        if found != size:
            return f"{file} is damaged ({found} bytes where {size} were written)"
        if _sha256(file) != digest:
            return f"{file} is damaged (its digest is not the one that was written)"
    return None


def damage(folder: Path) -> str | None:
    """Which file of a folder is not the one that its manifest lists, in one clause; None when all are."""
    try:
        return _damage(folder, _read_manifest(folder / MANIFEST)[1])
    except ValueError as error:
        return str(error).rstrip(".")


def _read_manifest(path: Path) -> tuple[Any, dict[str, tuple[int, str]]]:
    """The format of a manifest, and (bytes, digest) of its files; ValueError where it is damaged."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    return manifest.get("format"), files


def _sha256(path: Path, size: int | None = None) -> str:
    """The digest of a file, or of its first ``size`` bytes, a piece in memory at a time."""
    with path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        hashed = hashlib.sha256()
        while size > 0 and (piece := file.read(min(size, _PIECE))):
            hashed.update(piece)
            size -= len(piece)
        return hashed.hexdigest()


def journal_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of the journal up to the checkpoint's step."""
    mark = schema.state_of(Path(folder)).journal
    return mark.bytes if mark else 0


def journal_mark(journal: str | os.PathLike[str], steps: int) -> dict[str, Any]:
    """A checkpoint's entry on its journal: steps, bytes and digest."""
    size = os.stat(journal).st_size
    return {"steps": steps, "bytes": size, "sha256": _sha256(Path(journal), size)}
