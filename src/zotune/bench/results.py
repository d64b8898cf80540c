"""The runs of a bench on disk: whether one is new, resumable or done, and its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zotune.bench.plan import Run
from zotune.bench.worker import LOG_FILE
from zotune.io.failures import FAILED
from zotune.io.json_files import write_json
from zotune.training import run_folder
from zotune.training.checkpoint import storage

RESULT_FILE = "result.json"
#: The status of results that another attempt would only repeat.
FINAL = ("done", "diverged")


class Results:
    """The runs of a bench on disk.

    Args:
        folder: of the bench; runs are in `runs/`.
        keep_models: keep weights and checkpoints of runs that are done. Their journals always stay, for `zotune replay`.
    """

    def __init__(self, folder: Path, *, keep_models: bool = False):
        self.folder, self.keep_models = folder, keep_models

    def place(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / run.key

    def get(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, or None."""
        return _read(self.place(run) / RESULT_FILE)

    def resumable(self, run: Run) -> bool:
        """Whether there is a checkpoint or journal for `zotune train --resume_from_checkpoint true`."""
        return run_folder.kind_of(self.place(run)) is run_folder.Kind.KEPT

    def ended(self, run: Run) -> bool:
        """Whether a run ended, even if its result has not been collected."""
        return (self.place(run) / run_folder.SUMMARY_FILE).is_file()

    def collect(self, run: Run, code: int) -> dict[str, Any]:
        """Writes and returns the result of a run that ended with an exit code (:mod:`zotune.io.failures`)."""
        place = self.place(run)
        summary = _read(place / run_folder.SUMMARY_FILE) if code == 0 else None
        result: dict[str, Any] = {"run": run.title, "seed": run.seed, "options": dict(run.cell.options), "tried": dict(run.cell.tried)}
        if summary is not None:
            history = _read(place / run_folder.HISTORY_FILE) or {"entries": []}
            result |= {"status": "done", "summary": summary, "history": history["entries"]}
            result["versions"] = run_folder.read_run(place)["versions"]
        else:
            reason = self.last_line(run)
            diverged = code == FAILED and "finite" in reason
            result |= {"status": "diverged" if diverged else "failed", "exit_code": code, "reason": reason}
        if result["status"] in FINAL and not self.keep_models:
            _drop_weights(place)
        write_json(place / RESULT_FILE, result)  # last: a bench that is killed before collects again
        return result

    def last_line(self, run: Run) -> str:
        """The last line of a run's log that is not empty."""
        log = self.place(run) / LOG_FILE
        try:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - 4096))
                lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except FileNotFoundError:
            return ""
        return lines[-1].removeprefix("zotune: ") if lines else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _drop_weights(place: Path) -> None:
    storage.delete_named(place)  # the model
    storage.remove_drafts(place)
    for path in storage.checkpoints(place):
        storage.delete(path)
