"""Names that a file gives of other files: they stay within its folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def is_inside(name: Any) -> bool:
    """Whether a name is a relative path without ``..``, on every system."""
    if not isinstance(name, str) or not name or name.startswith("~") or "\0" in name:
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.anchor) and ".." not in windows.parts


def inside(folder: Path, name: Any, source: Path, *, follow: bool = False) -> Path:
    """The file of ``folder`` that ``source`` names.

    Args:
        follow: whether links are followed, which must not lead out of the folder either.

    Raises:
        ValueError: the name is none, or leads out of the folder.
    """
    if not is_inside(name) or (follow and not (folder / name).resolve().is_relative_to(folder.resolve())):
        raise ValueError(f"{source} is damaged: it names {name!r}, which is outside of the folder.")
    return folder / name


def indexed_files(index: Path) -> list[Path]:
    """The files of an index of weights (``*.index.json``), each once; ValueError where it is none, or names files outside of its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is damaged: it does not say which file holds which weight.") from None
    return [inside(index.parent, name, index) for name in sorted(names, key=str)]


def check_indexes(folder: Path) -> None:
    """ValueError where an index of weights in a folder is damaged, or names files outside of the folder."""
    for index in folder.glob("*.index.json"):
        indexed_files(index)
