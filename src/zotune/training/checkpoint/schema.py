"""The types of what the JSON files of a checkpoint hold, checked before a run resumes from it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from zotune.io.typed import read_fields
from zotune.training.checkpoint.files import ARGUMENTS, RNG, SCHEDULER, STATE, TRAINER_STATE, load_json
from zotune.training.checkpoint.identity import WeightsIdentity
from zotune.training.log_sums import StepSums

ANOTHER = "resume from another checkpoint"


@dataclass
class JournalMark:
    """Where a checkpoint is in its journal.

    Attributes:
        steps: of the journal.
        bytes, sha256: of the journal up to there.
    """

    steps: int
    bytes: int
    sha256: str


@dataclass
class Batch:
    """The examples of a step.

    Attributes:
        per_device: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        examples: of a step, of all processes together.
    """

    per_device: int
    accumulation: int
    examples: int


@dataclass
class State:
    """`zotune_state.json`.

    Attributes:
        format: of the checkpoint.
        optimizer: state of the optimizer without its tensors.
        tensors: name → [dtype, shape].
        journal: where the checkpoint is in it.
        since_log: sums since the last log entry.
        weights: dtypes, and the digest of what is not trained.
        training: the options that determine the run, and `batch`.
    """

    format: int
    optimizer: dict[str, Any]
    tensors: dict[str, list[Any]]
    journal: JournalMark | None
    since_log: StepSums
    weights: WeightsIdentity
    training: dict[str, Any]


@dataclass
class SavedSchedule:
    """`scheduler.json`."""

    type: str
    state: dict[str, Any]


@dataclass
class Generators:
    """`rng_state.json`: states of the global generators; those of torch in hexadecimal."""

    python: list[Any]
    numpy: list[Any]
    torch: str
    cuda: list[str] = dataclasses.field(default_factory=list)

    def python_state(self) -> tuple[Any, ...]:
        """For `random.setstate`."""
        number, internal, gauss = self.python
        return number, tuple(internal), gauss

    def numpy_state(self) -> tuple[Any, ...]:
        """For `numpy.random.set_state`."""
        kind, keys, *rest = self.numpy
        return (kind, np.array(keys, dtype=np.uint32), *rest)


@dataclass
class Progress:
    """`trainer_state.json`, of `transformers.Trainer`."""

    global_step: int
    max_steps: int
    epoch: float | None = None
    num_train_epochs: int = 0
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    logging_steps: float = 0
    eval_steps: float | None = 0
    save_steps: float = 0


def state_of(folder: Path) -> State:
    """`zotune_state.json`; ValueError where it is damaged."""
    state = read_fields(State, load_json(folder / STATE), folder / STATE, remedy=ANOTHER)
    read_fields(Batch, state.training.get("batch"), f"{folder / STATE} (batch)", remedy=ANOTHER)
    if state.journal is not None and min(state.journal.steps, state.journal.bytes) < 0:
        raise ValueError(f"{folder / STATE} is damaged, its 'journal' is none: {ANOTHER}.")
    return state


def generators_of(folder: Path) -> Generators:
    """`rng_state.json`, tried on generators of its own; ValueError where it is damaged."""
    path = folder / RNG
    found = read_fields(Generators, load_json(path), path, remedy=ANOTHER)
    with refused(path):
        random.Random().setstate(found.python_state())
        np.random.RandomState().set_state(found.numpy_state())
        torch.Generator().set_state(tensor_of(found.torch))
        for each in found.cuda:
            bytes.fromhex(each)
    return found


def check(folder: Path) -> None:
    """ValueError where a JSON file of a checkpoint holds other types than a run writes."""
    state_of(folder)
    generators_of(folder)
    read_fields(SavedSchedule, load_json(folder / SCHEDULER), folder / SCHEDULER, remedy=ANOTHER)
    path = folder / TRAINER_STATE
    content = load_json(path)
    progress = read_fields(Progress, content, path, remedy=ANOTHER)
    unknown = set(content) - {field.name for field in dataclasses.fields(TrainerState)}
    callbacks = all(isinstance(each, dict | list) for each in progress.stateful_callbacks.values())
    if unknown or progress.global_step < 0 or progress.max_steps < 0 or not callbacks:
        raise ValueError(f"{path} is damaged, {min(unknown, default='its steps')!r} is none of a run: {ANOTHER}.")
    if (folder / ARGUMENTS).is_file() and not isinstance(load_json(folder / ARGUMENTS), dict):
        raise ValueError(f"{folder / ARGUMENTS} is damaged, it holds no object: {ANOTHER}.")


def kinds_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Name → [dtype, shape]."""
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}


def tensor_of(text: str) -> torch.Tensor:
    """The bytes of a hexadecimal text, uint8."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


@contextmanager
def refused(place: Path) -> Iterator[None]:
    """Errors within, of content that does not fit, become one ValueError that names the place."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except ValueError as error:
        text = " ".join(str(error).split())
        raise (error if str(place) in text else ValueError(f"{place}: {text.rstrip('.')}: {ANOTHER}.")) from error
    except Exception as error:  # libraries have classes of their own for configurations that do not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{place} is damaged, or of another run ({reason[:200]}): {ANOTHER}.") from error
