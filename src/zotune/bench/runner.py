"""Running a grid: one process per run, several at a time, until every run has a result."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from zotune.bench.grid import Grid
from zotune.bench.plan import Cell, Place, Run, words
from zotune.bench.progress import Progress
from zotune.bench.results import FINAL, Results
from zotune.bench.selection import due, total
from zotune.bench.worker import Job, work
from zotune.io.cores import available_cores
from zotune.io.failures import WRONG
from zotune.io.lock import locked
from zotune.training import run_folder
from zotune.training.observer import RunObserver

_POLL_EVERY = 0.2  # seconds


class Runner:
    """Brings every run of a grid to its result.

    Args:
        grid: the grid.
        places: its cells, from `plan.check`.
        results: the runs on disk.
        data_dir: as in `zotune train`.
        processes: runs at a time.
        threads: of torch, per run.
        progress: receives the events.
        observer: makes each run's observer, in its process; its output goes to the run's log.
    """

    def __init__(
        self,
        grid: Grid,
        places: Mapping[Place, Sequence[Cell]],
        results: Results,
        data_dir: str | None,
        processes: int,
        threads: int,
        progress: Progress,
        observer: Callable[[], RunObserver] = RunObserver,
    ):
        self.grid, self.places, self.results = grid, places, results
        self.data_dir, self.processes, self.threads = data_dir, processes, threads
        self.progress, self.observer = progress, observer
        self._running: dict[Run, tuple[ForkServerProcess, int]] = {}
        self._tried: set[str] = set()  # a failed run is tried once per invocation
        self._restarted: set[str] = set()
        self._found: dict[str, dict[str, Any]] = {}

    def find(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, or None; a failure of an earlier invocation does not count, so that the run is tried again."""
        if run.key not in self._found:
            result = self.results.get(run)
            if result is None or (result["status"] not in FINAL and run.key not in self._tried):
                return None
            self._found[run.key] = result
        return self._found[run.key]

    def carry_out(self) -> None:
        """Carries out all runs without a result.

        Raises:
            ValueError: another bench works in this folder.
            KeyboardInterrupt: after the running runs were ended; they resume from their checkpoints the next time.
        """
        # A forked process can use a GPU only if its parent has not initialized CUDA, not even to count devices.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # Threads that wait by spinning make small models many times slower on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A process of its own gives each run its own memory peak; forked from one with the libraries imported, it starts at once.
        context = multiprocessing.get_context("forkserver")
        figures = ["matplotlib.figure", "matplotlib.backends.backend_agg"]  # of each run's curve
        context.set_forkserver_preload(["zotune.training.run", "zotune.bench.worker", self.observer.__module__, *figures])
        with locked(self.results.folder):
            self.progress.begin(total(self.places, self.grid.seeds, self.grid.tune_seeds))
            try:
                while self._advance(context):
                    time.sleep(_POLL_EVERY)
            finally:
                for process, _ in self._running.values():
                    process.terminate()
                for process, _ in self._running.values():
                    process.join()
                self.progress.close()

    def _advance(self, context: Any) -> bool:
        """Collects ended runs and starts waiting ones; False when none is left."""
        for run, (process, _) in list(self._running.items()):
            if process.exitcode is not None:
                del self._running[run]
                self._ended(run, process.exitcode)
        wanted = due(self.places, self.grid.seeds, self.grid.tune_seeds, self.find)
        waiting = [run for run in wanted if self.find(run) is None and run not in self._running]
        self.progress.show(sum(self.find(run) is not None for run in wanted), {r: self.results.last_line(r) for r in self._running})
        for run in waiting[: self.processes - len(self._running)]:
            if self.results.ended(run):  # an earlier bench was killed before it collected the result
                self._ended(run, 0)
            else:
                self._start(run, context)
        return bool(self._running or waiting)

    def _start(self, run: Run, context: Any) -> None:
        place = self.results.place(run)
        place.mkdir(parents=True, exist_ok=True)
        command = words(run, place, self.data_dir)
        if self.results.resumable(run) and run.key not in self._restarted:
            command += ["--resume_from_checkpoint", "true"]
        else:
            self._restarted.add(run.key)
            if run_folder.kind_of(place) is not run_folder.Kind.UNUSED:
                command += ["--overwrite_output_dir"]
        slot = min(set(range(self.processes)) - {slot for _, slot in self._running.values()})
        job = Job(command, str(Path.cwd()), str(place), self.threads, environment(slot), self.observer)
        process = context.Process(target=work, args=(job,))
        process.start()
        self._running[run] = process, slot

    def _ended(self, run: Run, code: int) -> None:
        if code == WRONG and run.key not in self._restarted:
            self._restarted.add(run.key)  # its checkpoint cannot be resumed, after an upgrade for example: start over
            return
        self._tried.add(run.key)
        self.progress.ended(run, self.results.collect(run, code))


def environment(slot: int) -> dict[str, str]:
    """Variables that give the run in a slot one of several GPUs, of those that CUDA_VISIBLE_DEVICES names if it is set."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = list(map(str, range(torch.cuda.device_count()))) if named is None else [name for name in named.split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": known[slot % len(known)]} if len(known) > 1 else {}


def default_threads(processes: int) -> int:
    """Threads per run where ``processes`` share the machine, at most ``OMP_NUM_THREADS``."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, available_cores() // processes)
    return min(share, int(allowed)) if allowed.isdigit() and int(allowed) else share


def folder_of(grid_file: Path) -> Path:
    """The default folder of a grid file's bench."""
    return Path("runs") / f"bench-{grid_file.stem}"
