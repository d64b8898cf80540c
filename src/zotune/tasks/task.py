"""A task: where its rows are, how a row becomes a prompt with answers, and how they are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from zotune.tasks.metrics import ANSWER_METRICS, METRICS
from zotune.tasks.template import CHANGES, columns_of, did_you_mean, render, text_of

Row = Mapping[str, Any]

_KEYS = {
    "name", "title", "hub", "subset", "splits", "files", "columns", "derived", "encoder", "label", "labels", "drop_labels",
    "answers", "candidates", "max_new_tokens", "template", "templates", "options", "answer", "length_normalize", "metrics", "citation",
}  # fmt: skip
_REQUIRED = ("name", "columns", "templates")

#: The column that holds, while an answer is rendered, that answer's own text.
ANSWER = "answer"


@dataclass(frozen=True)
class Task:
    """One task with one of its prompt templates chosen.

    Of three kinds. Classification and multiple choice with a label: `labels` and `options`. Multiple choice among candidates that a row
    lists: `gold` and `candidates`. Generation: `gold` alone, the answer being written freely.

    Attributes:
        name, title, citation: what it is called, in a line, and where it comes from.
        hub, subset: data set id and configuration on the Hugging Face hub.
        splits: ``train`` and ``eval`` -> split name, on the hub and as the stem of a local file.
        files: ``train`` and ``eval`` -> stem of the local file, where it is not the split's name.
        columns: columns every row must have, besides the label.
        derived: further columns made from those, by a map of values or by named text changes.
        encoder: one or two templates whose text a sequence-classification model reads.
        label_column: column of the right answer, or of the right answers' texts.
        labels, label_names: value in that column and class name of each option, in option order.
        drop_labels: label values that mean "no gold label"; such rows are left out.
        gold: where the right answers' texts are: a column, or a column and its field; empty for a task with labels.
        candidates: column that lists a row's options.
        max_new_tokens: most tokens of an answer that is generated.
        template: name of the chosen template (``"custom"`` for a user's own).
        prompt, options: the template's text and its answer options, themselves templates; a leading blank in an
            option belongs to the option. A task with `gold` has one: what an answer, ``{answer}``, is written as.
        length_normalize: whether an option's score is its log-likelihood divided by its number of tokens.
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
    files: Mapping[str, str] = field(default_factory=dict)
    gold: tuple[str, ...] = ()
    candidates: str | None = None
    max_new_tokens: int | None = None
    length_normalize: bool = False

    def render(self, row: Row) -> tuple[str, tuple[str, ...]]:
        """Prompt and answer options of a row (of a generation task its right answers); blanks at the prompt's end move to the options."""
        full = self._complete(row)
        prompt = render(self.prompt, full)
        if self.gold:
            texts = self._candidates(row) if self.candidates else self.references(row)
            options = tuple(render(self.options[0], self._complete({**row, ANSWER: text})) for text in texts)
        else:
            options = tuple(render(option, full) for option in self.options)
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
        """Index of the right option (the first, of several); a label may be given by its value or by its class name.

        Raises:
            ValueError: if the label is none of the task's.
        """
        if self.gold:
            return self.right(row)[0]
        label = row[self.label_column]
        for index, (value, name) in enumerate(zip(self.labels, self.label_names, strict=True)):
            if label in (value, name):
                return index
        known = ", ".join(f"{v!r} ({n})" for v, n in zip(self.labels, self.label_names, strict=True))
        raise ValueError(f"column {self.label_column!r} holds {label!r}, which is none of the options {known}.")

    def right(self, row: Row) -> tuple[int, ...]:
        """Indices of all right options."""
        if not self.gold:
            return (self.answer(row),)
        if not self.candidates:
            return tuple(range(len(self.references(row))))
        references, candidates = self.references(row), self._candidates(row)
        found = tuple(index for index, text in enumerate(candidates) if text in references)
        if not found:
            raise ValueError(f"none of the right answers {list(references)} is among the row's {self.candidates!r}.")
        return found

    def references(self, row: Row) -> tuple[str, ...]:
        """The right answers' texts, each once; of a task with labels the right option's."""
        if not self.gold:
            return (self.render(row)[1][self.answer(row)].strip(),)
        value: Any = row
        for key in self.gold:
            value = value.get(key) if isinstance(value, Mapping) else None
        texts = _texts([value] if isinstance(value, str) else value)
        if not texts:
            raise ValueError(f"column {'.'.join(self.gold)!r} holds no answer: a text, or a list of texts, is expected.")
        return texts

    @property
    def generation(self) -> bool:
        """Whether answers are written freely, rather than chosen."""
        return bool(self.gold) and self.candidates is None

    @property
    def fixed_options(self) -> bool:
        """Whether every row has the same options (then a classifier can have one class an option)."""
        return not self.gold and not any(columns_of(option) for option in self.options)

    def _candidates(self, row: Row) -> tuple[str, ...]:
        assert self.candidates is not None
        texts = _texts(row[self.candidates])
        if len(texts) < 2:
            raise ValueError(f"column {self.candidates!r} must list two options or more.")
        return texts

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
            replacements = rule.get("replace", {})
            if any(ANSWER in columns_of(new) for new in replacements.values()) and ANSWER not in row:
                continue  # a column of the answers', and this is the prompt
            for old, new in replacements.items():
                text = text.replace(old, render(new, row))
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
        if options is not None and task.gold:
            raise ValueError("its answers are texts of each row, so it has no options to choose: leave options out.")
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
    gold = _gold(raw)
    for key in _REQUIRED if gold else (*_REQUIRED, "label", "labels"):
        if not raw.get(key):
            raise ValueError(f"the key {key!r} is missing.")
    for key, kind in (("columns", list), ("labels", dict), ("templates", dict)):
        if key in raw and not isinstance(raw[key], kind):
            raise ValueError(f"{key!r} must be a {'list' if kind is list else 'mapping'}.")
    columns = tuple(map(str, raw["columns"]))
    by_label = raw.get("labels") or {}
    labels, label_names = tuple(by_label), tuple(map(str, by_label.values()))
    if not gold and len(labels) < 2:
        raise ValueError("'labels' needs at least two entries, label value: class name.")
    derived = raw.get("derived") or {}
    _check_derived(derived, (*columns, ANSWER) if gold else columns)

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
    candidates = raw.get("candidates")
    if candidates is not None and candidates not in columns:
        raise ValueError(f"the candidates come from {candidates!r}, which is not in 'columns'{did_you_mean(candidates, columns)}.")
    generation = bool(gold) and candidates is None
    known: Mapping[str, Any] = ANSWER_METRICS if generation else METRICS
    metrics = tuple(raw.get("metrics") or tuple(known)[:1])
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"unknown metric {metric!r}{did_you_mean(metric, known)}; there are {', '.join(known)}.")
    if gold:
        _check_answer(options, derived)
    return Task(
        name=str(raw["name"]),
        title=str(raw.get("title", raw["name"])),
        hub=raw.get("hub"),
        subset=raw.get("subset"),
        splits={"train": "train", "eval": "validation", **(raw.get("splits") or {})},
        columns=columns,
        derived=derived,
        encoder=encoder,
        label_column=gold[0] if gold else str(raw["label"]),
        labels=labels,
        label_names=label_names,
        drop_labels=tuple(raw.get("drop_labels") or ()),
        template=name,
        prompt=prompt,
        options=(options,) if gold else _options(options, labels, label_names),
        templates=tuple(templates),
        metrics=metrics,
        citation=str(raw.get("citation", "")),
        files=raw.get("files") or {},
        gold=gold,
        candidates=candidates,
        max_new_tokens=_max_new_tokens(raw) if generation else None,
        length_normalize=bool(raw.get("length_normalize", False)),
    )


def _gold(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Column and field of the right answers' texts; () for a task with labels."""
    value = raw.get("answers")
    if value is None:
        for key in ("candidates", "max_new_tokens", "answer"):
            if key in raw:
                raise ValueError(f"{key!r} goes with 'answers', the column of the right answers' texts.")
        return ()
    for key in ("label", "labels", "options"):
        if key in raw:
            raise ValueError(f"'answers' and {key!r} exclude each other: a task has right answers' texts, or labels and options.")
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _max_new_tokens(raw: Mapping[str, Any]) -> int:
    value = raw.get("max_new_tokens", 50)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"'max_new_tokens' is {value!r}; give a number of tokens, 1 or more.")
    return value


def _check_answer(template: Any, derived: Mapping[str, Any]) -> None:
    """What answers are written as must hold the answer, itself or in a column made with it."""
    if not isinstance(template, str):
        raise ValueError("a task with 'answers' writes them by one text, e.g. answer: \" {answer}\".")
    holding = {ANSWER} | {
        name for name, rule in derived.items() if any(ANSWER in columns_of(new) for new in (rule.get("replace") or {}).values())
    }
    if not holding & set(columns_of(template)):
        raise ValueError(f"the answer {template!r} does not hold {{answer}}, the answer's own text.")


def _texts(values: Any) -> tuple[str, ...]:
    """A column's list of texts, stripped, each once, in order; () for anything else."""
    if not isinstance(values, (list, tuple)):
        return ()
    return tuple(dict.fromkeys(text for value in values if (text := str(value).strip())))


def _template_parts(raw: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Prompt and options of a template, written as a string (with the task's `options`) or as a mapping of both."""
    entry = raw["templates"][name]
    if isinstance(entry, str):
        entry = {"prompt": entry}
    key, what = (ANSWER, "an answer") if raw.get("answers") is not None else ("options", "options")
    options = entry.get(key, raw.get(key)) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not options:
        raise ValueError(f"template {name!r} needs a prompt, and {what} of its own or of the task.")
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
        raise ValueError("'derived' must map new columns to {column: ..., map: ...}, {..., apply: ...} or {..., replace: ...}.")
    for name, rule in derived.items():
        if not isinstance(rule, dict) or not set(rule) <= {"column", "map", "apply", "replace"} or "column" not in rule:
            raise ValueError(f"derived column {name!r} needs 'column' and 'map', 'apply' or 'replace'.")
        if rule["column"] not in columns:
            raise ValueError(f"derived column {name!r} comes from {rule['column']!r}, which is not in 'columns'.")
        for change in rule.get("apply", ()):
            if change not in CHANGES:
                raise ValueError(f"unknown change {change!r}{did_you_mean(change, CHANGES)}; there are {', '.join(CHANGES)}.")
        replacements = rule.get("replace", {})
        if not isinstance(replacements, dict):
            raise ValueError(f"derived column {name!r}: 'replace' must map a text to what stands in its place.")
        for new in replacements.values():
            for column in columns_of(str(new)):
                if column not in columns:
                    raise ValueError(
                        f"derived column {name!r} puts in {column!r}, which is not in 'columns'{did_you_mean(column, columns)}."
                    )


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
