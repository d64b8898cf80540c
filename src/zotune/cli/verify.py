"""`zotune verify`: checks a run's folder, and names the checkpoint to resume from."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from zotune.cli.parser import CommandParser
from zotune.optim.journal import verify
from zotune.training import run_folder
from zotune.training.checkpoint import contents, storage


def main(argv: Sequence[str]) -> int:
    """Runs `zotune verify`; 1 when something is damaged."""
    parser = CommandParser(
        "zotune verify",
        "Checks a run's folder without its model: the journal's checksums and order, every file of every checkpoint against its digest. "
        "Writes nothing; exit code 1 means damage.",
    )
    parser.add_argument("run", help="the run's folder")
    folder = Path(parser.parse(argv).run).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the --output_dir of a run.")
    if run_folder.kind_of(folder) in (run_folder.Kind.UNUSED, run_folder.Kind.FOREIGN):
        raise ValueError(f"{folder} holds no run: there is no journal, checkpoint or model in it.")
    notes, faults = findings(folder)
    try:
        for line in (*notes, *(f"damaged: {fault}" for fault in faults)):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # its reader has ended; the exit code says the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if faults else 0


def findings(folder: Path) -> tuple[list[str], list[str]]:
    """Sentences on what a run's folder holds, and on the damage in it."""
    notes: list[str] = []
    faults: list[str] = []
    kind = run_folder.kind_of(folder)
    if kind in (run_folder.Kind.BEGUN, run_folder.Kind.ENDED):
        notes.append(f"{folder} holds {kind.value}.")
    journal = folder / run_folder.JOURNAL_FILE
    if journal.is_file() and kind is not run_folder.Kind.BEGUN:
        found = verify(journal)
        if found.ok:
            notes.append(f"{journal}: {found.message}")
        else:
            faults.append(found.message)
    for name in (run_folder.RUN_FILE, run_folder.SUMMARY_FILE):
        if (folder / name).is_file():
            try:
                contents.load_json(folder / name)
            except ValueError:
                faults.append(f"{folder / name} is not JSON.")
    newest = None
    for saved in storage.checkpoints(folder) if kind is not run_folder.Kind.BEGUN else ():
        fault = storage.problem(saved, journal)
        if fault is None:
            newest = newest or saved
            notes.append(f"{saved}: whole")
        else:
            faults.append(fault)
    if (folder / storage.MANIFEST).is_file() and kind is not run_folder.Kind.BEGUN:
        fault = storage.damage(folder)
        if fault is None:
            notes.append(f"{folder}: the trained model is whole")
        elif (folder / run_folder.SUMMARY_FILE).is_file():
            faults.append(f"{fault}.")
        else:
            notes.append(f"{folder}: the trained model was being written; resuming writes it again.")
    notes += [f"{path}: left by an interrupted save or deletion; the next start removes it." for path in storage.leftovers(folder)]
    if newest is not None:
        notes.append(f"resuming goes on from {newest}.")
    elif journal.is_file() and kind is not run_folder.Kind.BEGUN:
        notes.append("no checkpoint to go on from; base model and journal rebuild the weights (`zotune replay`).")
    return notes, faults
