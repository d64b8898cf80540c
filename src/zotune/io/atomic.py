"""Atomic writes: :func:`whole_file`, :func:`write_text`, :func:`sync`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it at the end of the block; after an error it is removed and the old file stays.

    Both are synced to disk: after a power cut there is the old file or the new one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole_file(path) as partial:
        ...     length = partial.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        yield path
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically, and makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: str | os.PathLike[str]) -> None:
    """Writes a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
