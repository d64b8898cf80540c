"""One run of a bench in a process of its own, which ends with the bench."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zotune.io.failures import explain
from zotune.training.observer import RunObserver

LOG_FILE, _LOCK_FILE = "log.txt", ".lock"


@dataclass(frozen=True)
class Job:
    """A run for :func:`work`.

    Attributes:
        words: after `zotune train`.
        here: the working folder, which a forkserver process does not inherit.
        folder: of the run's log and lock; the lock keeps a process of an earlier bench out.
        threads: of torch.
        environment: variables to set before CUDA is initialized.
        observer: makes the run's observer.
    """

    words: Sequence[str]
    here: str
    folder: str
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)
    observer: Callable[[], RunObserver] = RunObserver


def work(job: Job) -> None:
    """Carries out a run and exits with its code (:mod:`zotune.io.failures`); its output goes to the folder's `log.txt`."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.update(job.environment)
    os.chdir(job.here)
    place = Path(job.folder)
    with (place / _LOCK_FILE).open("w") as lock, (place / LOG_FILE).open("ab", buffering=0) as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        # The inherited objects write to the parent's buffers.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        import torch

        torch.set_num_threads(job.threads)
        code = run_words(job.words, job.observer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter shutdown would wait for the libraries' threads


def run_words(words: Sequence[str], observer: Callable[[], RunObserver] = RunObserver) -> int:
    """Carries out the run of the words after `zotune train` and returns its exit code; an error is one sentence on stderr."""
    from zotune.memory.offload_needs import needs_of
    from zotune.training import run_config
    from zotune.training.quiet import quiet_environment, quiet_libraries
    from zotune.training.run import run

    quiet_environment()
    quiet_libraries()
    try:
        run(run_config.parse(words), observer(), needs_of)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        known = explain(error)
        if known is None:  # a bug, to be reported with its traceback
            raise
        message, code = known
    print(f"zotune: {message}", file=sys.stderr)
    return code


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a child"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run_words(sys.argv[1:]))
