"""Beginning and resuming a run: its checkpoint, its journal, and the steps of the journal after the checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from zotune.optim.journal import Journal
from zotune.optim.journal_records import Record
from zotune.optim.optimizer import ZerothOrder
from zotune.optim.resume import usable
from zotune.training.checkpoint import identity, schema, storage
from zotune.training.run_folder import ADAPTER_FOLDER, keeps_steps

logger = logging.getLogger(__name__)


def refuse_used(folder: Path) -> None:
    """ValueError for a folder that already holds a run."""
    if keeps_steps(folder):
        raise ValueError(f"{folder} already holds a run: continue it with resume_from_checkpoint=True, or choose another output_dir.")


def checkpoint_of(run: Path, journal: Path, wanted: str | os.PathLike[str] | Literal[True], *, alone: bool) -> Path | None:
    """The checkpoint to resume from; None: the base weights and the journal.

    Args:
        run: the run's folder.
        journal: the run's journal.
        wanted: a checkpoint, or True for the newest whole one.
        alone: whether the run may resume from its journal alone.

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
    if alone and journal.is_file():  # interrupted before the first checkpoint, or none is whole
        if faults:
            logger.warning("%s Resuming from the base weights and the journal instead.", faults[0])
        return None
    raise ValueError(faults[0] if faults else f"{run} holds no checkpoint to resume from: start without resume_from_checkpoint.")


def recorded(journal: Path, checkpoint_folder: Path | None) -> dict[str, Any] | None:
    """The options that determine a run (:func:`resume_rules.determining`), of its checkpoint or else of its journal.

    None for a journal of an optimizer of the user's own.
    """
    if checkpoint_folder is None:
        return Journal.open(journal).header.get("training")
    return schema.state_of(checkpoint_folder).training


def begin(optimizer: ZerothOrder, model: nn.Module, path: Path, training: Mapping[str, Any]) -> None:
    """Creates the journal of a new run at ``path``; a fresh adapter, which is random, is saved beside it for replay.

    Args:
        training: the options that determine the run.

    Raises:
        ValueError: the optimizer has already taken steps.
    """
    if optimizer.steps:
        raise ValueError(
            f"the optimizer has already taken {optimizer.steps} steps, and a run starts at step 0: pass a new "
            "ZerothOrder, or resume from a checkpoint with resume_from_checkpoint."
        )
    if optimizer.journal is None:
        if hasattr(model, "peft_config"):
            with storage.draft(path.parent / ADAPTER_FOLDER) as folder:
                model.save_pretrained(folder)  # type: ignore[operator]
                storage.write_manifest(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        optimizer.journal = Journal.create(path, {**optimizer.header(), "training": dict(training)})


def resume(optimizer: ZerothOrder, path: Path, checkpoint_folder: str | None, *, along_journal: bool) -> None:
    """Opens the journal of a resumed run; the optimizer retakes its steps after the checkpoint, or they are deleted.

    Args:
        optimizer: of the run, loaded from the checkpoint.
        path: of the journal.
        checkpoint_folder: None: the run resumes from the base weights.
        along_journal: whether the steps after the checkpoint are retaken.

    Raises:
        ValueError: the journal of another run, or of other base weights.
    """
    journal = optimizer.journal or Journal.open(path)
    here = optimizer.header(base=checkpoint_folder is None)
    names = [name for name in ("format", "method", "options", "seed", "groups", "base") if name in here]
    different: list[str] = [name for name in names if journal.header.get(name) != here[name]]
    different += ["privacy"] if journal.header.get("privacy") != here.get("privacy") else []
    identity.check_dtypes(
        journal.path,
        *(sorted({dtype for group in each["groups"] for _, _, dtype in group["parameters"]}) for each in (journal.header, here)),
    )
    if different == ["base"]:
        raise ValueError(
            f"the run of {journal.path} has no checkpoint, and began from other weights than these: pass the model that it began from, "
            "or start a new run in another output_dir."
        )
    if different:
        raise ValueError(
            f"the journal {journal.path} was written with another {', '.join(different)}: resume with the settings of "
            "that run, or start a new one in another output_dir."
        )
    tail = journal.after(0 if checkpoint_folder is None else storage.journal_bytes(checkpoint_folder))
    count = retaken(optimizer, tail) if along_journal else 0
    evaluator = optimizer.evaluator
    if len(journal) and checkpoint_folder is None:  # the clock may have chosen how its steps were evaluated
        last = (_choices(tail) or [{"batched": True, "rowwise": True}])[-1]
        evaluator.restore(last["batched"], last.get("rowwise", False))
    choices = _choices(tail[count:])
    journal.drop(len(tail) - count)
    for event in choices:
        journal.append(event)
    optimizer.fast_forward(tail[:count])
    optimizer.journal = journal


def retaken(optimizer: ZerothOrder, records: Sequence[Record]) -> int:
    """How many of the records the optimizer can retake steps from."""
    calibrated = optimizer.calibrator is not None and optimizer.calibrator.chooses_lr
    return usable(records, calibrated or optimizer.output_gradients is not None)


def _choices(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The events of evaluation choices among the records."""
    return [record for record in records if isinstance(record, dict) and record.get("event") == "forward_batching"]
