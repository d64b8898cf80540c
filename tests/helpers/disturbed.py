"""Attempts of `zotune train` that are disturbed, in processes that fork from this one: killed, interrupted, on a full disk."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from zotune.cli.main import main as zotune_command
from zotune.subspaces import LowRankCoordinate


@dataclass
class Disturbance:
    """What happens to an attempt: a kind, and the file operation (or fold) where, or the seconds after which."""

    kind: str = "none"
    at: float = 0

    def arm(self, folder: Path) -> None:
        """Sets it in this process."""
        if self.kind in ("none", "time"):
            return
        left = int(self.at)

        def passed(torn: Callable[[], object] = lambda: None) -> None:
            nonlocal left
            left -= 1
            if left > 0 or (left < 0 and self.kind != "refused"):
                return
            if self.kind in ("kill", "fold"):
                torn()
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.kind == "full":  # every write from now on fails, also those of libraries in C and Rust
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            else:
                raise OSError(28, os.strerror(28))

        if self.kind == "fold":
            around(LowRankCoordinate, "fold", passed)
            return
        around(os, "fsync", passed)
        around(os, "pwrite", passed)
        place, events = str(folder), ["os.rename", "os.mkdir", "os.truncate"]
        events += [] if self.kind == "refused" else ["os.remove", "os.rmdir"]  # a full disk lets files be deleted

        def audit(event: str, values: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = values
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and isinstance(path, str) and path.startswith(place):
                    passed()
            elif event in events and str(values[0]).startswith(place):
                passed()

        sys.addaudithook(audit)


def around(owner: Any, name: str, passed: Callable[..., None]) -> None:
    genuine = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if name == "pwrite":
            descriptor, blob, end = args
            passed(lambda: genuine(descriptor, blob[: len(blob) // 2], end))  # a torn record
        else:
            passed()
        return genuine(*args, **kwargs)

    setattr(owner, name, patched)


@dataclass
class Ended:
    """How an attempt ended: its exit code (None: killed), and what it wrote to standard error."""

    code: int | None
    error: str

    @property
    def refused(self) -> bool:
        """Whether the command did not fit what the folder holds."""
        return self.code == 2 and ("already holds" in self.error or "so no run to continue" in self.error)


def forked(work: Callable[[], int], after: float | None = None) -> Ended:
    """``work`` in a process of its own, which is killed after so many seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(write, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warnings.simplefilter("ignore")
            code = work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        error = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(None if code == -signal.SIGKILL else code, error)


def train(words: list[str], folder: Path, disturbance: Disturbance) -> Ended:
    """The command in a process of its own, disturbed."""

    def work() -> int:
        disturbance.arm(folder)
        return zotune_command(["train", *words])

    return forked(work, disturbance.at if disturbance.kind == "time" else None)


def worker(words: list[str], folder: Path, disturbances: list[Disturbance]) -> None:
    """A process of torchrun; its first attempts are disturbed in the first process."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "0" and attempt < len(disturbances):
        disturbances[attempt].arm(folder)
    code = zotune_command(["train", *words])
    if code:
        os._exit(code)  # the agent waits for the result of a function that has ended well


def torchrun(words: list[str], folder: Path, disturbances: list[Disturbance], processes: int) -> Ended:
    """The command under the agent of torchrun, in a process of its own, which starts it again after each disturbance."""

    def work() -> int:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config = LaunchConfig(1, 1, processes, run_id="none", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
        config.max_restarts, config.monitor_interval = len(disturbances) + 1, 0.02
        try:
            elastic_launch(config, worker)(words, folder, disturbances)
        except ChildFailedError as error:
            return next(iter(error.failures.values())).exitcode
        return 0

    return forked(work)
