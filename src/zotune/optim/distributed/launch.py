"""The launch of `torchrun` that processes belong to, and whether an earlier attempt of it began the run in a folder.

`torchrun --max-restarts` starts all processes again with the same words. What they find in the folder may be another run, which the first
attempt was refused: only the folder itself can tell. A run therefore keeps the names of its launch's agents, the processes that start
workers and start them again. Of several machines one may be replaced: a launch is the same where any agent is.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from zotune.io.json_files import write_json
from zotune.optim.distributed.workers import Workers

LAUNCH_FILE = "zotune_launch.json"


def restarted(folder: str | os.PathLike[str]) -> bool:
    """Whether `torchrun` has started this process again after an earlier attempt of its launch began, or resumed, the run in a folder.

    The same on all processes. False where the folder holds another run, such as one that the first attempt was refused for.

    Raises:
        ValueError: there are several processes, and they are not connected yet.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") in ("", "0"):
        return False
    workers = Workers()
    if not workers.several and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ValueError("the processes are not connected yet: call restarted() after zotune.ZOConfig(...), or init_process_group().")
    here = agents(workers)
    return workers.from_first(lambda: not set(here).isdisjoint(_written(Path(folder))))


def agents(workers: Workers) -> list[str]:
    """The agents of all workers' launch, sorted; empty without `torchrun`. All workers call it."""
    return sorted({agent for agent in workers.exchange(_agent()) if agent})


def mark(folder: Path, names: list[str]) -> None:
    """Writes which launch works in a folder; without one, no later attempt of an earlier launch may take the run for its own."""
    if names:
        write_json(folder / LAUNCH_FILE, {"agents": names})
    else:
        (folder / LAUNCH_FILE).unlink(missing_ok=True)


def _agent() -> str:
    """The agent of this process: its folder of logs, which is new for every launch and stays for all attempts; else the parent process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    folder, attempt, _ = os.environ.get("TORCHELASTIC_ERROR_FILE", "").partition(f"{os.sep}attempt_")
    return f"{socket.gethostname()}:{folder if attempt else _parent()}"


def _parent() -> str:
    """The parent process: its number and, on Linux, when it started (a number is used again)."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return str(parent)
    return f"{parent}@{started}@{boot}"


def _written(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / LAUNCH_FILE).read_text(encoding="utf-8"))["agents"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
