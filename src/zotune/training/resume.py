"""Where a run goes on: the checkpoint that a folder holds, and the journal beyond it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from zotune.optim import resume
from zotune.optim.journal import Journal, Record
from zotune.optim.optimizer import ZerothOrder
from zotune.training.checkpoint import contents, storage
from zotune.training.run_folder import JOURNAL_FILE

logger = logging.getLogger(__name__)


def refuse_used(folder: Path) -> None:
    """
    Raises:
        ValueError: a folder for a new run holds one.
    """
    if (folder / JOURNAL_FILE).exists() or storage.checkpoints(folder):
        raise ValueError(f"{folder} already holds a run: continue it with resume_from_checkpoint=True, or choose another output_dir.")


def checkpoint_of(run: Path, journal: Path, wanted: str | os.PathLike[str] | Literal[True], *, alone: bool) -> Path | None:
    """The checkpoint to go on from; None: the run goes on from its beginning, the base weights and its journal.

    Args:
        run: the run's folder.
        journal: the run's journal.
        wanted: a checkpoint, or True for the newest whole one.
        alone: whether the run may go on from its journal alone.

    Raises:
        ValueError: there is none, or the wanted one is damaged.
    """
    if wanted is not True:
        fault = storage.problem(wanted, journal)
        if fault is not None:
            raise ValueError(fault)
        return Path(wanted)
    faults = []
    for folder in storage.checkpoints(run):
        fault = storage.problem(folder, journal)
        if fault is None:
            return folder
        faults.append(fault)
    if alone and journal.is_file():  # it was cut off before its first checkpoint, or none is whole
        if faults:
            logger.warning("%s Going on from the base weights and the journal instead.", faults[0])
        return None
    raise ValueError(faults[0] if faults else f"{run} holds no checkpoint to resume from: start without resume_from_checkpoint.")


def batch_size(folder: Path, usual: int, per_device: int) -> int:
    """Examples a micro-batch of the run that goes on from a checkpoint, which another number of processes does not change."""
    settings = folder / storage.ARGUMENTS
    if not settings.is_file():
        return usual
    then = contents.load_json(settings).get("per_device_train_batch_size")
    saved = contents.load_json(folder / storage.TRAINER_STATE).get("train_batch_size")
    return saved if saved and then == per_device else usual


def continued(journal: Journal, optimizer: ZerothOrder, checkpoint_folder: str | None, *, follows: bool) -> Journal:
    """The journal of a resumed run.

    What it holds beyond the checkpoint (None: everything, from the base weights) the optimizer follows, or, where a certain checkpoint
    was asked for, it is cut off.

    Raises:
        ValueError: it is the journal of another run, or of other base weights.
    """
    here = optimizer.header(base=checkpoint_folder is None)
    names = [name for name in ("format", "method", "options", "seed", "groups", "base") if name in here]
    different = [name for name in names if journal.header.get(name) != here[name]]
    if different == ["base"]:
        raise ValueError(
            f"the run of {journal.path} has no checkpoint to go on from, and began from other weights than these: pass the model that it "
            "began from, or start a new run in another output_dir."
        )
    if different:
        raise ValueError(
            f"the journal {journal.path} was written with another {', '.join(different)}: resume with the settings of "
            "that run, or start a new one in another output_dir."
        )
    tail = journal.after(0 if checkpoint_folder is None else storage.journal_bytes(checkpoint_folder))
    count = followed(optimizer, tail) if follows else 0
    if len(journal) and checkpoint_folder is None:  # how its steps were evaluated may have been chosen by the clock
        last = (ways(tail) or [{"batched": True, "apart": True}])[-1]
        optimizer.evaluator.restore(last["batched"], last.get("apart", False))
    journal.drop(len(tail) - count)
    for event in ways(tail[count:]):
        journal.append(event)
    optimizer.fast_forward(tail[:count])
    return journal


def followed(optimizer: ZerothOrder, records: Sequence[Record]) -> int:
    """How many of the records a run can follow and then go on by itself."""
    measured = optimizer.calibrator is not None and optimizer.calibrator.chooses_lr
    return resume.usable(records, measured=measured or optimizer.guidance is not None)


def ways(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The events among them that say how the run is evaluated, where that is not batched."""
    return [record for record in records if isinstance(record, dict) and record.get("event") == "forward_batching"]
