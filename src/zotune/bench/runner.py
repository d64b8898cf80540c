"""Running a grid: several processes, each one training run, until every run has a result."""

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
from zotune.io.failures import WRONG
from zotune.io.lock import locked
from zotune.training import run_folder
from zotune.training.observer import RunObserver

_POLL_EVERY = 0.2  # seconds


class Runner:
    """Brings every run of a grid to its result.

    Args:
        grid: what to run.
        places: its cells, from `plan.check`.
        results: where runs and results are.
        data_dir: as in `zotune train`.
        processes: runs at a time.
        threads: of torch, for each.
        progress: shows what happens.
        observer: of every run, made in its process; its output goes to the run's log. Default: none.
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
        self._tried: set[str] = set()  # a run that failed is tried once in an invocation
        self._restarted: set[str] = set()
        self._found: dict[str, dict[str, Any]] = {}

    def find(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, or None; of one that failed in an earlier invocation, None until it has been tried again."""
        if run.key not in self._found:
            result = self.results.get(run)
            if result is None or (result["status"] not in FINAL and run.key not in self._tried):
                return None
            self._found[run.key] = result
        return self._found[run.key]

    def carry_out(self) -> None:
        """All runs, those that are there already left alone.

        Raises:
            ValueError: another bench works in this folder.
            KeyboardInterrupt: after the runs under way were ended; they go on from their checkpoints the next time.
        """
        # Processes that are forked can use a GPU only if the one that they are forked from has not so much as looked for it.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # Threads that wait by spinning make small models many times slower as soon as something else wants a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A process a run makes its peak of memory its own; forked from one that has imported the libraries, it starts at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zotune.training.run", "zotune.bench.worker", self.observer.__module__])
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
        """Takes in what has ended, starts as many as may run at a time; False when nothing runs and nothing can be started."""
        for run, (process, _) in list(self._running.items()):
            if process.exitcode is not None:
                del self._running[run]
                self._ended(run, process.exitcode)
        wanted = due(self.places, self.grid.seeds, self.grid.tune_seeds, self.find)
        waiting = [run for run in wanted if self.find(run) is None and run not in self._running]
        self.progress.show(sum(self.find(run) is not None for run in wanted), {r: self.results.last_line(r) for r in self._running})
        for run in waiting[: self.processes - len(self._running)]:
            if self.results.ended(run):  # and the bench was killed before it noticed
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
            if run_folder.holds_run(place):
                command += ["--overwrite_output_dir"]
        slot = min(set(range(self.processes)) - {slot for _, slot in self._running.values()})
        job = Job(command, str(Path.cwd()), str(place), self.threads, _environment(slot), self.observer)
        process = context.Process(target=work, args=(job,))
        process.start()
        self._running[run] = process, slot

    def _ended(self, run: Run, code: int) -> None:
        if code == WRONG and run.key not in self._restarted:
            self._restarted.add(run.key)  # its checkpoint cannot be continued, by other versions for example: from the start, then
            return
        self._tried.add(run.key)
        self.progress.ended(run, self.results.collect(run, code))


def _devices() -> list[str]:
    """The GPUs that runs are dealt out to, as in CUDA_VISIBLE_DEVICES."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def _environment(slot: int) -> dict[str, str]:
    """What the run in a slot sees of several GPUs: one of them."""
    known = _devices()
    return {"CUDA_VISIBLE_DEVICES": known[slot % len(known)]} if len(known) > 1 else {}


def default_threads(processes: int) -> int:
    """Threads a run where ``processes`` share the machine; no more than ``OMP_NUM_THREADS`` allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, cores // processes)
    return min(share, int(allowed)) if allowed.isdigit() and int(allowed) else share


def folder_of(grid_file: Path) -> Path:
    """Where a grid file's bench goes when no folder is named."""
    return Path("runs") / f"bench-{grid_file.stem}"
