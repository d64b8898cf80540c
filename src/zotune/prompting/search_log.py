"""The log of a search, `search.jsonl`: its settings, then an event a line; a search that was stopped goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from zotune.io.text import shown
from zotune.tasks.sources import read_jsonl

FORMAT = 1
LOG_FILE, BEST_FILE, SUMMARY_FILE = "search.jsonl", "best.yaml", "summary.json"

_NUMBER = (int, float)
_SCORED = {"loss": (*_NUMBER, NoneType), "value": (*_NUMBER, NoneType), "sequences": (int,)}
#: Kind of an event -> its entries and their types.
EVENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "round": {"kept": (list,), "sequences": (int,)},
    "held_out": {"prompt": (str,), "options": (list,), "loss": _NUMBER, "value": _NUMBER, "sequences": (int,)},
    "scored": {"proposal": (str,), "prompt": (str, NoneType), "options": (list, NoneType), "text": (str,), **_SCORED},
    "reply": {"reply": (str,)},
}
KEPT: dict[str, tuple[type, ...]] = {"template": (int,), "prompt": (str,), "options": (list,), "loss": _NUMBER, "value": _NUMBER}


def _is_event(event: dict[str, Any]) -> bool:
    shape = EVENTS.get(str(event.get("event")))
    if shape is None or not _fits(event, shape) or not all(isinstance(each, str) for each in event.get("options") or ()):
        return False
    kept = event.get("kept")
    return kept is None or (bool(kept) and all(isinstance(each, dict) and _fits(each, KEPT) for each in kept))


def _fits(values: Mapping[str, Any], shape: Mapping[str, tuple[type, ...]]) -> bool:
    return all(name in values and isinstance(values[name], types) for name, types in shape.items())


class SearchLog:
    """Events of a search on disk.

    Args:
        folder: of the search; must be new or empty, or hold the log of a search with the same settings.
        settings: all that the result depends on.

    Attributes:
        events: those on file when it was opened.

    Raises:
        ValueError: the folder holds something else, or a search with other settings, or a damaged log.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path, self.settings = folder / LOG_FILE, json.loads(json.dumps(settings))
        self.events: list[dict[str, Any]] = []
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder} is a file; name a folder.")
        if self.path.is_file() and self.path.stat().st_size:
            self.events = self._read()
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--output_dir {folder} holds files, and none of them is the log of a search: choose another folder.")

    def _read(self) -> list[dict[str, Any]]:
        self._drop_partial_line()
        if not self.path.stat().st_size:
            return []
        first, *events = list(read_jsonl(self.path))
        if first.get("zotune_prompt") != FORMAT or not isinstance(first.get("settings"), dict):
            raise ValueError(f"{self.path} is no log of a search that this zotune wrote: choose another --output_dir.")
        then = first["settings"]
        for name, value in self.settings.items():
            if then.get(name) != value:
                raise ValueError(
                    f"{self.path.parent} holds a search with another {name} ({shown(then.get(name))}, here {shown(value)}): give the same "
                    "options to go on with it, or choose another --output_dir."
                )
        if not all(map(_is_event, events)):
            raise ValueError(f"{self.path} is damaged: a line is no event of a search; choose another --output_dir.")
        return events

    def _drop_partial_line(self) -> None:
        """Removes a last line that a crash cut; where it is the only one, the file is empty afterwards."""
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def add(self, event: Mapping[str, Any]) -> None:
        """Appends an event; before the first one the settings."""
        fresh = not self.path.is_file() or not self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            for each in ([{"zotune_prompt": FORMAT, "settings": self.settings}] if fresh else []) + [dict(event)]:
                file.write(json.dumps(each, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The events on file of one kind."""
        return [event for event in self.events if event.get("event") == kind]
