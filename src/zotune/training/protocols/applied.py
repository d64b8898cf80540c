"""A protocol in a run: its options as words before those that are given, and a record of both."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.tasks.objective_choice import is_encoder
from zotune.tasks.reading import EVAL_SOURCES, has_eval_rows
from zotune.training.arguments import names_gguf
from zotune.training.option_parser import option_words
from zotune.training.protocols.protocol import Place, Protocol, Settings, load

_ENCODERS = re.compile(r"bert|electra", re.IGNORECASE)
_OPT = re.compile(r"(^|[/-])opt-", re.IGNORECASE)


@dataclass(frozen=True)
class Applied:
    """The record of a protocol in a run.

    Attributes:
        name, source: of the protocol.
        options: what it sets.
        overridden: option -> [the protocol's value, the run's].
        grid: option -> the values that the paper tried.
        notes: what the protocol does not say.
    """

    name: str
    source: str
    options: Mapping[str, Any]
    overridden: Mapping[str, list[Any]]
    grid: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    """A protocol's options as words of the command."""

    protocol: Protocol
    settings: Settings

    @property
    def options(self) -> Mapping[str, Any]:
        return self.settings.options

    @property
    def words(self) -> list[str]:
        return [word for name, value in self.options.items() for word in option_words(name, value)]

    def record(self, its_values: Mapping[str, Any], values: Mapping[str, Any]) -> Applied:
        """The record; `its_values` are the protocol's options as parsed, `values` those of the run."""
        pairs = {name: [_plain(its_values[name]), _plain(values[name])] for name in self.options}
        overridden = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        protocol, settings = self.protocol, self.settings
        return Applied(protocol.name, protocol.source, dict(self.options), overridden, dict(settings.grid), settings.notes)


def applied(values: Mapping[str, Any], given: set[str]) -> Words | None:
    """The protocol that the options of a run name, for what they say is run; None without one.

    Args:
        values: of all options, by name.
        given: the names of those that were given.

    Raises:
        ValueError: there is no such protocol, or it has no settings for this model, task or scheme.
    """
    if not values.get("protocol"):
        return None
    protocol = load(values["protocol"])
    own = {name: values[name] for name in given}
    place = place_of(protocol, values["model_name_or_path"], values["task"], own)
    settings = protocol.settings(place, own)
    options = dict(settings.options)
    if not has_eval_rows(*(values[name] for name in EVAL_SOURCES)):
        options.pop("num_eval", None)
    if names_gguf(values["model_name_or_path"]):
        options.pop("dtype", None)  # the file's own
    return Words(protocol, dataclasses.replace(settings, options=options))


def place_of(protocol: Protocol, model: str | None, task: str | None, given: Mapping[str, Any]) -> Place:
    """What a run is of.

    The kind of a model follows from a given objective, else from its configuration where that is on this machine, else from its name.
    """
    kind, family = _model_of(model or "")
    objective = given.get("objective")
    if objective is not None:
        kind = "encoder" if objective in ("mlm", "classifier") else "decoder"
    return Place(kind, family, task, given.get("scheme", "full"), given.get("method", protocol.method))


def _plain(value: Any) -> Any:
    """A number that is spelled as text as a number; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _model_of(name: str) -> tuple[str, str | None]:
    """Kind and family of a model; never from the network."""
    config = _local_config(name)
    if config is None:
        return "encoder" if _ENCODERS.search(name) else "decoder", "opt" if _OPT.search(name) else None
    return "encoder" if is_encoder(config) else "decoder", getattr(config, "model_type", None)


def _local_config(name: str) -> Any:
    """A model's configuration, from its folder or from the hub's cache; None where there is none."""
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if folder.is_file() or not name:
        return None
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        try:
            name = str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
        except (OSError, ValueError):
            return None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):  # it is not here, or damaged, which loading says
        return None
