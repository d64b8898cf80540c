"""One run of a bench, in a process of its own: the command `zotune train`, which ends when the bench does."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

LOG_FILE, _LOCK_FILE = "log.txt", ".lock"


def work(words: Sequence[str], here: str, folder: str, threads: int, environment: dict[str, str]) -> None:
    """Runs `zotune` with these words and leaves with its exit code; what it prints goes to the folder's `log.txt`.

    Args:
        words: the command line, subcommand first.
        here: the working folder, which a process of multiprocessing does not take over.
        folder: of the run's log and lock; two processes never work in one folder, whatever became of the bench that started them.
        threads: of torch.
        environment: variables to set before anything asks for a GPU.
    """
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.update(environment)
    os.chdir(here)
    place = Path(folder)
    with (place / _LOCK_FILE).open("w") as lock, (place / LOG_FILE).open("ab", buffering=0) as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        # Their buffers belong to the process that this one was made from.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        import torch

        from zotune.cli import main

        torch.set_num_threads(threads)
        code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter shutdown: it would wait for threads of libraries


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a child"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
