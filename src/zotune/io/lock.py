"""A lock that lets one process work in a run folder: :func:`locked`, :func:`check_in_place`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: no lock there
    fcntl = None  # type: ignore[assignment]

_locks: dict[tuple[int, int], int] = {}  # (device, inode) of a locked folder -> depth


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a run folder, which is made if missing, for this process; reentrant.

    The lock is the operating system's, on the folder itself: it leaves no file and ends with the process.

    Raises:
        ValueError: another process has locked it.
        OSError: the folder cannot be made or opened.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        place = os.fstat(descriptor)
        key = (place.st_dev, place.st_ino)
        if key not in _locks:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is training in {folder}: wait until it has ended, stop it, or choose another output_dir."
                ) from None
        _locks[key] = _locks.get(key, 0) + 1
        try:
            yield
        finally:
            _locks[key] -= 1
            if not _locks[key]:
                del _locks[key]
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for children that inherited the descriptor
    finally:
        os.close(descriptor)


def check_in_place(folder: str | os.PathLike[str]) -> None:
    """OSError where a folder that this process has locked was deleted, moved or replaced since."""
    try:
        place = os.stat(folder)
    except FileNotFoundError:
        place = None
    if fcntl is not None and (place is None or (place.st_dev, place.st_ino) not in _locks):
        raise OSError(f"{folder} was deleted or moved while a run was working in it: nothing more is written; start the run again.")
