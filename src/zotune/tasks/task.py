"""A task: where its rows are, how a row becomes a prompt with answer options, and how it is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from zotune.tasks.metrics import METRICS
from zotune.tasks.template import CHANGES, columns_of, did_you_mean, render, text_of

Row = Mapping[str, Any]

_KEYS = {
    "name", "title", "hub", "subset", "splits", "columns", "derived", "encoder", "label", "labels", "drop_labels",
    "template", "templates", "options", "metrics", "citation",
}  # fmt: skip
_REQUIRED = ("name", "columns", "label", "labels", "templates")


@dataclass(frozen=True)
class Task:
    """One classification or multiple-choice task with one of its prompt templates chosen.

    Attributes:
        name, title, citation: what it is called, in a line, and where it comes from.
        hub, subset: data set id and configuration on the Hugging Face hub.
        splits: ``train`` and ``eval`` -> split name, on the hub and as the stem of a local file.
        columns: columns every row must have, besides the label.
        derived: further columns made from those, by a map of values or by named text changes.
        encoder: one or two templates whose text a sequence-classification model reads.
        label_column: column of the right answer.
        labels, label_names: value in that column and class name of each option, in option order.
        drop_labels: label values that mean "no gold label"; such rows are left out.
        template: name of the chosen template (``"custom"`` for a user's own).
        prompt, options: the template's text and its answer options, themselves templates; a leading blank in an
            option belongs to the option.
        templates: names of the bundled templates.
        metrics: names of the metrics, the main one first.
    """

    name: str
    title: str
    hub: str | None
    subset: str | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    derived: Mapping[str, Mapping[str, Any]]
    encoder: tuple[str, ...]
    label_column: str
    labels: tuple[Any, ...]
    label_names: tuple[str, ...]
    drop_labels: tuple[Any, ...]
    template: str
    prompt: str
    options: tuple[str, ...]
    templates: tuple[str, ...]
    metrics: tuple[str, ...]
    citation: str

    def render(self, row: Row) -> tuple[str, tuple[str, ...]]:
        """Prompt and answer options of a row; blanks at the prompt's end move to the front of the options."""
        row = self._complete(row)
        prompt = render(self.prompt, row)
        options = tuple(render(option, row) for option in self.options)
        bare = prompt.rstrip(" ")
        if bare != prompt:
            # "… is " + "great" is the text "… is great", whose tokens are "… is" and " great".
            options = tuple(option if option.startswith(" ") else " " + option for option in options)
        return bare, options

    def encoder_texts(self, row: Row) -> tuple[str, ...]:
        """The one or two texts that a sequence-classification model reads."""
        row = self._complete(row)
        return tuple(render(template, row) for template in self.encoder)

    def answer(self, row: Row) -> int:
        """Index of the right option; a label may be given by its value or by its class name.

        Raises:
            ValueError: if the label is none of the task's.
        """
        label = row[self.label_column]
        for index, (value, name) in enumerate(zip(self.labels, self.label_names, strict=True)):
            if label in (value, name):
                return index
        known = ", ".join(f"{v!r} ({n})" for v, n in zip(self.labels, self.label_names, strict=True))
        raise ValueError(f"column {self.label_column!r} holds {label!r}, which is none of the options {known}.")

    @property
    def fixed_options(self) -> bool:
        """Whether every row has the same options (then a classifier can have one class an option)."""
        return not any(columns_of(option) for option in self.options)

    def _complete(self, row: Row) -> Row:
        if not self.derived:
            return row
        full = dict(row)
        for name, rule in self.derived.items():
            text = text_of(row, rule["column"])
            if "map" in rule:
                if text not in rule["map"]:
                    raise ValueError(f"column {rule['column']!r} holds {text!r}, not one of {', '.join(rule['map'])}.")
                text = rule["map"][text]
            for change in rule.get("apply", ()):
                text = CHANGES[change](text)
            full[name] = text
        return full


def names() -> list[str]:
    """Names of the bundled tasks, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def load(
    name_or_path: str | Path,
    template: str | None = None,
    options: Sequence[str] | Mapping[Any, str] | None = None,
) -> Task:
    """A bundled task by name, or a user's own YAML file by path.

    Args:
        name_or_path: e.g. ``"sst2"`` or ``"my_task.yaml"``.
        template: name of one of the task's templates, or a prompt of one's own with ``{column}`` placeholders.
        options: answer options in place of the template's: a list in label order, or label (or class name) -> text.

    Raises:
        ValueError: for an unknown task or template, or a file that is no valid task.

    Example:
        >>> load("sst2", template="mezo").render({"sentence": "a joy ."})
        ('a joy . It was', (' terrible', ' great'))
    """
    source = str(name_or_path)
    own_file = source.endswith((".yaml", ".yml"))
    if own_file:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no task file {source}: give the path of a YAML file or one of {', '.join(names())}.")
        text = path.read_text(encoding="utf-8")
    else:
        if source not in names():
            raise ValueError(
                f"unknown task {source!r}{did_you_mean(source, names())}; "
                "list them with `zotune tasks` or give the path of your own YAML file."
            )
        text = (_folder() / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"task file {source} is not valid YAML: {' '.join(str(error).split())}.") from None
    try:
        task = _parse(raw, template)
        if options is not None:
            task = replace(task, options=_options(options, task.labels, task.label_names))
        _check_join(task)
    except ValueError as error:
        raise ValueError(f"task {source}: {error}") from None
    return task


def _folder() -> Traversable:
    return resources.files("zotune.tasks")


def _parse(raw: Any, chosen: str | None) -> Task:
    if not isinstance(raw, dict):
        raise ValueError("the file must hold a mapping of keys such as name, columns, label, labels, templates.")
    for key in raw:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}{did_you_mean(key, _KEYS)}.")
    for key in _REQUIRED:
        if not raw.get(key):
            raise ValueError(f"the key {key!r} is missing.")
    for key, kind in (("columns", list), ("labels", dict), ("templates", dict)):
        if not isinstance(raw[key], kind):
            raise ValueError(f"{key!r} must be a {'list' if kind is list else 'mapping'}.")
    columns = tuple(map(str, raw["columns"]))
    labels, label_names = tuple(raw["labels"]), tuple(map(str, raw["labels"].values()))
    if len(labels) < 2:
        raise ValueError("'labels' needs at least two entries, label value: class name.")
    derived = raw.get("derived") or {}
    _check_derived(derived, columns)

    templates = raw["templates"]
    default = raw.get("template") or next(iter(templates))
    if default not in templates:
        raise ValueError(f"the default template {default!r} is not among {', '.join(templates)}.")
    if chosen is not None and "{" in chosen:
        name, prompt, options = "custom", chosen, _template_parts(raw, default)[1]
    else:
        name = chosen or default
        if name not in templates:
            raise ValueError(
                f"no template {name!r}{did_you_mean(name, templates)}; there are {', '.join(templates)}, "
                "or give a prompt of your own with {column} placeholders."
            )
        prompt, options = _template_parts(raw, name)
    columns_of(prompt)  # malformed placeholders are found here, not at the first row

    encoder = tuple(raw.get("encoder") or (f"{{{column}}}" for column in columns[:2]))
    if len(encoder) > 2:
        raise ValueError("'encoder' takes one template or two.")
    metrics = tuple(raw.get("metrics") or ("accuracy",))
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}; there are {', '.join(METRICS)}.")
    return Task(
        name=str(raw["name"]),
        title=str(raw.get("title", raw["name"])),
        hub=raw.get("hub"),
        subset=raw.get("subset"),
        splits={"train": "train", "eval": "validation", **(raw.get("splits") or {})},
        columns=columns,
        derived=derived,
        encoder=encoder,
        label_column=str(raw["label"]),
        labels=labels,
        label_names=label_names,
        drop_labels=tuple(raw.get("drop_labels") or ()),
        template=name,
        prompt=prompt,
        options=_options(options, labels, label_names),
        templates=tuple(templates),
        metrics=metrics,
        citation=str(raw.get("citation", "")),
    )


def _template_parts(raw: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Prompt and options of a template, written as a string (with the task's `options`) or as a mapping of both."""
    entry = raw["templates"][name]
    if isinstance(entry, str):
        entry = {"prompt": entry}
    options = entry.get("options", raw.get("options")) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not options:
        raise ValueError(f"template {name!r} needs a prompt, and options of its own or of the task.")
    return entry["prompt"], options


def _options(options: Sequence[str] | Mapping[Any, str], labels: Sequence[Any], label_names: Sequence[str]) -> tuple[str, ...]:
    """Options in label order, from a list in that order or a mapping by label or class name."""
    wanted = f"{len(labels)} options, one for each of {', '.join(label_names)}"
    if isinstance(options, Mapping):
        by_key = {str(key): text for key, text in options.items()}
        ordered = [by_key.pop(str(label), by_key.pop(name, None)) for label, name in zip(labels, label_names, strict=True)]
        if by_key or None in ordered:
            raise ValueError(f"the options {dict(options)} do not name {wanted}.")
    else:
        ordered = list(options) if not isinstance(options, str) else [options]
    if len(ordered) != len(labels):
        raise ValueError(f"got {len(ordered)} options {ordered}, but the task has {wanted}.")
    texts = tuple(str(option) for option in ordered)
    for text in texts:
        columns_of(text)
        if not text.strip():
            raise ValueError(f"an option is blank; give {wanted}.")
    if len(set(texts)) != len(texts):
        raise ValueError(f"two options are the same in {list(texts)}; they could not be told apart.")
    return texts


def _check_derived(derived: Any, columns: Sequence[str]) -> None:
    if not isinstance(derived, dict):
        raise ValueError("'derived' must map new columns to {column: ..., map: ...} or {column: ..., apply: ...}.")
    for name, rule in derived.items():
        if not isinstance(rule, dict) or not set(rule) <= {"column", "map", "apply"} or "column" not in rule:
            raise ValueError(f"derived column {name!r} needs 'column' and 'map' or 'apply'.")
        if rule["column"] not in columns:
            raise ValueError(f"derived column {name!r} comes from {rule['column']!r}, which is not in 'columns'.")
        for change in rule.get("apply", ()):
            if change not in CHANGES:
                raise ValueError(f"unknown change {change!r}{did_you_mean(change, CHANGES)}; there are {', '.join(CHANGES)}.")


def _check_join(task: Task) -> None:
    """Two words must not run into each other where the option begins: "… It was" + "great"."""
    end, words = task.prompt[-1:], " ".join(task.prompt.split()[-2:])
    ends_in_text = end.isascii() and (end.isalnum() or (end and end in '.,:;!?}"'))
    for option in task.options:
        if ends_in_text and option[0].isascii() and option[0].isalnum():
            raise ValueError(
                f"the prompt ends in {words!r} and the option {option!r} starts without a blank, so they would read "
                f"{words + option!r}: write the option as {' ' + option!r}."
            )
