"""The contents of `zotune_run.json`: their types, and the options of a run that resumes with others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from zotune.io.typed import fits, read_fields
from zotune.training import resume_rules
from zotune.training.arguments import DataArguments, ModelArguments
from zotune.training.base_identity import BaseIdentity
from zotune.training.checkpoint.identity import check_dtypes
from zotune.training.config import settings
from zotune.training.resume_rules import Batch, Rule
from zotune.training.run_config import RunConfig
from zotune.training.schemes import Scheme


@dataclass
class Examples:
    """The encoded training examples.

    Attributes:
        count: how many.
        digest: of all of them, in order.
    """

    count: int
    digest: str


@dataclass
class Resumed:
    """A resumption with other options.

    Attributes:
        when: ISO date.
        command: its command.
        changed: option → [then, now].
    """

    when: str
    command: str
    changed: dict[str, list[Any]]


@dataclass
class RunFile:
    """The entries of `zotune_run.json`; `format` is checked before."""

    format: int
    started: str = ""
    command: str = ""
    working_directory: str = ""
    base_model: str = ""
    base: BaseIdentity | None = None
    dtype: str | None = None
    classes: list[str] | None = None
    masked: bool = False
    kind: dict[str, Any] = field(default_factory=dict)
    chats: bool = False
    metric: str | None = None
    before: dict[str, float | None] | None = None
    batch: Batch | None = None
    examples: Examples | None = None
    protocol: dict[str, Any] | None = None
    model_arguments: dict[str, Any] = field(default_factory=dict)
    data_arguments: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    training_arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    resumed: list[Resumed] = field(default_factory=list)


#: The dataclasses of the groups of options that are read from a run's file.
_GROUPS = {"model_arguments": ModelArguments, "data_arguments": DataArguments, "scheme": Scheme}


def parsed(content: Mapping[str, Any], path: Path) -> RunFile:
    """The run of a file; ValueError where an entry or an option has another type."""
    run = read_fields(RunFile, content, path)
    for group, kind in _GROUPS.items():
        hints = get_type_hints(kind)
        for name, value in getattr(run, group).items():
            if name not in hints or not fits(value, hints[name]):
                raise ValueError(f"{path} is damaged, its {group} have {name}={value!r}, which is no such option or value.")
    return run


def options_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The options of a run by group, as plain JSON, with absolute paths."""
    groups = {
        "model_arguments": dataclasses.asdict(config.model),
        "data_arguments": _absolute(dataclasses.asdict(config.data)),
        "scheme": dataclasses.asdict(config.scheme),
        "training_arguments": settings(config.training),
    }
    return json.loads(json.dumps(groups, default=str))


def examples_of(rows: Sequence[Any] | None, key: bytes | None = None) -> Examples | None:
    """Number and digest of encoded examples; with a secret key, a digest that says nothing without it."""
    if rows is None:
        return None
    hashed = hashlib.blake2b(digest_size=16, key=key or b"", person=b"examples" if key else b"")
    for row in rows:
        hashed.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return Examples(len(rows), hashed.hexdigest())


def check_options(path: Path, run: RunFile, config: RunConfig) -> None:
    """ValueError where options of the run of a file differ that must not."""
    resume_rules.check_equal(path, _flat(dataclasses.asdict(run)), _flat(options_of(config)))


def check_examples(path: Path, run: RunFile, now: Examples | None, config: RunConfig) -> None:
    """ValueError where the encoded training examples are not those of the run."""
    if run.examples is None or now == run.examples:
        return
    places = resume_rules.differing(_flat(dataclasses.asdict(run)), _flat(options_of(config)), Rule.EXAMPLES)
    why = (
        "; ".join(f"{name} was {was!r} and is {value!r}" for name, (was, value) in places.items()) or "their files or the tokenizer changed"
    )
    count = 0 if now is None else now.count
    raise ValueError(
        f"{path}: the training examples are not those of the run ({run.examples.count} then, {count} now; {why}). Resume with the data of "
        "the run, or start a new run in another output_dir."
    )


def check_base(path: Path, run: RunFile, now: BaseIdentity | None) -> None:
    """ValueError where the base model is not that of the run."""
    if run.base is None or now is None:
        return
    check_dtypes(path, run.base.dtypes, now.dtypes)
    if now != run.base:
        raise ValueError(
            f"{path}: the run began from another base model than this one (digest of its weights {run.base.digest[:12]}…, of these "
            f"{now.digest[:12]}…): give the base model of that run, or start a new run in another output_dir."
        )


def changes(run: RunFile, config: RunConfig) -> dict[str, list[Any]]:
    """The options that differ from those of the run, and may: option → [then, now]."""
    then, now = _flat(dataclasses.asdict(run)), _flat(options_of(config))
    rules = (Rule.BATCH, Rule.EXAMPLES, Rule.WEIGHTS, Rule.FREE)
    return {name: list(pair) for rule in rules for name, pair in resume_rules.differing(then, now, rule).items()}


def _flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for group in (*_GROUPS, "training_arguments") for name, value in groups[group].items()}


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """The data options with absolute paths, for a later `zotune eval` from any folder."""
    for name in ("data_dir", "train_file", "eval_file", "guard_file", "attribute", "tools"):
        if data[name] is not None:
            data[name] = str(Path(data[name]).expanduser().resolve())
    if data["dataset_name"] is not None and (folder := Path(data["dataset_name"]).expanduser()).is_dir():
        data["dataset_name"] = str(folder.resolve())
    for name in ("task", "guard_task"):
        if data[name] and data[name].endswith((".yaml", ".yml")):
            data[name] = str(Path(data[name]).resolve())
    return data
