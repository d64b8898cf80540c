"""A run that has ended, with its model whole: :func:`finished`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zotune.training import run_folder
from zotune.training.checkpoint import storage


def finished(run: Path, then: str) -> dict[str, Any]:
    """`zotune_run.json` of a run that can be handed on.

    Args:
        run: its folder.
        then: what is done with it: "push" or "export".

    Raises:
        FileNotFoundError, ValueError: it is no folder of a run, the run has not ended, or its model is not whole.
    """
    record = run_folder.read_run(run)
    if not (run / run_folder.SUMMARY_FILE).is_file():
        raise ValueError(f"the run in {run} has not ended: resume it with --resume_from_checkpoint true, then {then} it.")
    damage = storage.damage(run) if (run / storage.MANIFEST).is_file() else None
    if damage is not None:
        raise ValueError(f"the model in {run} is not whole: {damage}.")
    return record
