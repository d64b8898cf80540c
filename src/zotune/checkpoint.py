"""Checkpoint folders of a run: safetensors and JSON only, complete or absent.

A checkpoint is written beside its final place, synced to disk and renamed last, so a save that is killed half-way
leaves no ``checkpoint-N``. Its manifest holds the size and digest of every file in it, and it names the journal it
belongs to by length and digest; one that is damaged, that the journal does not reach, or that was written by another
run, is not resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_bare_model
from torch import nn
from transformers.utils import logging as transformers_logging

from zotune import saved_state
from zotune.first_order import FirstOrder
from zotune.frozen_linear import any_frozen, dense_state
from zotune.offloading import saving, stream_of
from zotune.optimizer import ZerothOrder

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


# --- folders ---


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


# --- contents ---


def save_model(folder: Path, model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write the trained weights and the model's config: `save_pretrained`, or the bare weights of another module."""
    if stream_of(model) is not None:
        saving.save_model(model, folder)
        return
    if state_dict is None and any_frozen(model) and not hasattr(model, "peft_config"):
        state_dict = dense_state(model)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        save_bare_model(model, str(folder / "model.safetensors"))
        return
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one bar a checkpoint would cut up the bar of the run
    try:
        save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def truly_missing(model: nn.Module, missing: list[str]) -> list[str]:
    """Of the names missing from loaded weights, those that are not tied to a parameter that was there."""
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = {key for name, key in owner.items() if name not in set(missing)}
    return [name for name in missing if owner.get(name) not in loaded]


def save_optimizer(folder: Path, optimizer: ZerothOrder | FirstOrder, **extra: Any) -> None:
    """Write the optimizer's state: tensors as safetensors, the rest and `extra` as JSON."""
    run = optimizer.run if isinstance(optimizer, ZerothOrder) else None
    blocks = [] if run is None else saving.coordinates_by_block(run.model, run.probe.coordinates)
    away = {name for names in blocks for name in names}
    state = optimizer.state_dict() if run is None else saved_state.save(run, without=away)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.pop("state").items()}
    save_file(tensors, folder / STATE_TENSORS)
    if run is not None:
        for number, names in enumerate(blocks):  # of an offloaded model, of which no more is in memory at a time
            tensors = saved_state.coordinate_tensors(run, names)
            if tensors:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / BLOCK_TENSORS.format(number))
    save_json(folder / STATE, {"format": 1, "optimizer": state, **extra})


def load_optimizer(folder: Path, optimizer: ZerothOrder | FirstOrder) -> dict[str, Any]:
    """Restore what :func:`save_optimizer` wrote; returns the extra entries."""
    content = load_json(folder / STATE)
    if content.pop("format", None) != 1:
        raise ValueError(f"{folder / STATE} was written by another version of zotune: resume with that version.")
    tensors = load_file(folder / STATE_TENSORS)
    for path in sorted(folder.glob(BLOCK_TENSORS.format("*"))):
        tensors |= load_file(path)
    optimizer.load_state_dict({"state": tensors, **content.pop("optimizer")})
    return content


def save_scheduler(folder: Path, scheduler: Any) -> None:
    """Write a learning-rate scheduler's state as JSON.

    Raises:
        ValueError: the scheduler's state holds something that is not plain data.
    """
    state = scheduler.state_dict()
    try:
        save_json(folder / SCHEDULER, {"type": type(scheduler).__name__, "state": state})
    except TypeError as error:
        raise ValueError(
            f"the state of {type(scheduler).__name__} cannot be written as JSON ({error}): use a scheduler whose "
            "state_dict() holds plain numbers, or save_strategy='no'."
        ) from None


def load_scheduler(folder: Path, scheduler: Any) -> None:
    """Restore what :func:`save_scheduler` wrote.

    Raises:
        ValueError: no scheduler state there, or that of another kind of scheduler.
    """
    content = load_json(folder / SCHEDULER)
    if content["type"] != type(scheduler).__name__:
        raise ValueError(
            f"{folder} was written with the scheduler {content['type']}, not {type(scheduler).__name__}: "
            "resume with the lr_scheduler_type of the run."
        )
    scheduler.load_state_dict(content["state"])


def save_rng(folder: Path) -> None:
    """Write the states of the global generators (python, numpy, torch, CUDA) as JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_hex(s) for s in torch.cuda.get_rng_state_all()]
    save_json(folder / RNG, state)


def load_rng(folder: Path) -> None:
    """Restore what :func:`save_rng` wrote; generators of absent GPUs are passed over."""
    state = load_json(folder / RNG)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    for device, saved in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(_bytes(saved), device)


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


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


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
