"""The files of a run that are published, without paths of the machine that it ran on: :class:`PublishedFiles`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from zotune.io.json_files import write_json
from zotune.publishing.finished import finished
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.training.checkpoint.files import GGUF_SOURCE, MODELFILE, save_json

#: Beside the model. Checkpoints and completions, which hold texts of the training data, stay at home.
BESIDE = (
    run_folder.JOURNAL_FILE,
    run_folder.RUN_FILE,
    run_folder.SUMMARY_FILE,
    run_folder.HISTORY_FILE,
    run_folder.CURVE_FILE,
    run_folder.HEAD_FILE,
    run_folder.PROBE_FILE,
)
CARD = "README.md"
#: Entries that say where a run was.
_DROPPED = ("working_directory", "files")
#: The trainer's arguments, among the model's files.
_ARGUMENTS = "training_args.json"
#: Files of the libraries that may name the base model, and nothing else of the machine.
_NAME_THE_BASE = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")


class PublishedFiles:
    """A run's files as others get them, in a folder of their own.

    The model with its tokenizer, journal, record, summary, history and curve. Weights, journal and picture are links to the run's; in
    records of the run absolute paths become their last component, and the base model gets its published name. The manifest is of the
    files as they are published, so `zotune verify` takes the copy.

    Args:
        run: folder of a run that has ended.
        folder: an empty folder, to be filled.
        base: name of the base model on the hub; None: as the run names it.

    Raises:
        FileNotFoundError, ValueError: ``run`` is no folder of a run, or the run has not ended.
    """

    def __init__(self, run: Path, folder: Path, base: str | None = None) -> None:
        self.run, self.folder = run, folder
        record = finished(run, "push")
        self.local_base = str(record.get("base_model") or "")
        self.base = base or (self.local_base if not os.path.isabs(self.local_base) else None)
        adapter = run / run_folder.ADAPTER_FOLDER
        for place, of in ((folder, run), (folder / adapter.name, adapter)):
            named = storage.named_files(of)[:-1]
            for source in named:
                if source.name != CARD:  # peft's own, without content
                    self._publish(source)
            if named:
                storage.write_manifest(place)
        for name in BESIDE:
            if (run / name).is_file():
                self._publish(run / name)

    @property
    def record(self) -> dict[str, Any]:
        """The contents of `zotune_run.json`, as published."""
        return json.loads((self.folder / run_folder.RUN_FILE).read_text(encoding="utf-8"))

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`, as published."""
        return json.loads((self.folder / run_folder.SUMMARY_FILE).read_text(encoding="utf-8"))

    @property
    def paths(self) -> list[Path]:
        """All files, the card first."""
        found = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return sorted(found, key=lambda path: path.name != CARD)

    def add_card(self, text: str) -> None:
        """Writes the model card."""
        (self.folder / CARD).write_text(text, encoding="utf-8")

    def _publish(self, source: Path) -> None:
        place = self.folder / source.relative_to(self.run)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.name in (*_NAME_THE_BASE, GGUF_SOURCE):
            save_json(place, self._renamed(json.loads(source.read_text(encoding="utf-8"))))
        elif source.name == _ARGUMENTS or (source.suffix == ".json" and source.name in BESIDE):
            write_json(place, self._elsewhere(json.loads(source.read_text(encoding="utf-8"))))
        elif source.name == MODELFILE:
            place.write_text(source.read_text(encoding="utf-8").replace(self.local_base, self._base_name()), encoding="utf-8")
        else:
            _link(source.resolve(), place)

    def _base_name(self) -> str:
        return self.base or Path(self.local_base).name

    def _renamed(self, content: Any) -> Any:
        """JSON with the published name of the base model."""
        if isinstance(content, dict):
            return {name: self._renamed(value) for name, value in content.items()}
        return self._base_name() if content == self.local_base and content else content

    def _elsewhere(self, content: Any) -> Any:
        """JSON without absolute paths."""
        if isinstance(content, dict):
            kept = {name: value for name, value in content.items() if name not in _DROPPED}
            return {name: self._command(value) if name == "command" else self._elsewhere(value) for name, value in kept.items()}
        if isinstance(content, list):
            return [self._elsewhere(value) for value in content]
        return self._place(content) if isinstance(content, str) else content

    def _place(self, text: str) -> str:
        """A text, of an absolute path its last component."""
        if text == self.local_base or (text and Path(text).expanduser() == Path(self.local_base)):
            return self._base_name()
        return Path(text).name if len(text) < 4096 and os.path.isabs(os.path.expanduser(text)) else text

    def _command(self, text: str) -> str:
        return shlex.join(map(self._place, shlex.split(text)))


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system
        place.symlink_to(source)


def command_of(record: dict[str, Any]) -> str:
    """The command of a run, one option a line."""
    words = shlex.split(str(record.get("command") or ""))
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines if line)
