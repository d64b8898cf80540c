"""`zotune verify`: checks a run's folder, and names the checkpoint to resume from."""

from __future__ import annotations

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
    faults = findings(folder)
    for line in faults:
        print(f"damaged: {line}")
    return 1 if faults else 0


def findings(folder: Path) -> list[str]:
    """Sentences on the damage in a run's folder; intact files are printed."""
    faults: list[str] = []
    journal = folder / run_folder.JOURNAL_FILE
    if journal.is_file():
        found = verify(journal)
        if found.ok:
            print(f"{journal}: {found.message}")
        else:
            faults.append(found.message)
    for name in (run_folder.RUN_FILE, run_folder.SUMMARY_FILE):
        if (folder / name).is_file():
            try:
                contents.load_json(folder / name)
            except ValueError:
                faults.append(f"{folder / name} is not JSON.")
    newest = None
    for saved in storage.checkpoints(folder):
        fault = storage.problem(saved, journal)
        if fault is None:
            newest = newest or saved
            print(f"{saved}: whole")
        else:
            faults.append(fault)
    if newest is not None:
        print(f"resuming goes on from {newest}.")
    elif journal.is_file():
        print("no checkpoint to go on from; base model and journal rebuild the weights (`zotune replay`).")
    return faults
