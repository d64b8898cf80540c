"""What travels with the package: ``tiny-lm`` (a small language model) and ``reviews`` (labelled sentences)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

NAMES = ("tiny-lm", "reviews")


def path(name: str) -> Path:
    """Return the folder of a bundled model or data set.

    Args:
        name: ``"tiny-lm"`` (a ``save_pretrained`` folder) or ``"reviews"`` (``train.jsonl`` and ``test.jsonl``).

    Raises:
        ValueError: ``name`` is not bundled.
        FileNotFoundError: the package is not installed as plain files, or was installed without its data.

    Example:
        >>> from zotune import bundled
        >>> sorted(file.name for file in bundled.path("reviews").glob("*.jsonl"))
        ['test.jsonl', 'train.jsonl']
    """
    if name not in NAMES:
        raise ValueError(f"nothing called {name!r} is bundled with zotune; choose from {', '.join(NAMES)}.")
    folder = Path(str(files(__name__) / name))
    if not folder.is_dir():
        raise FileNotFoundError(f"bundled folder {folder} is missing; reinstall zotune with pip, unpacked.")
    return folder
