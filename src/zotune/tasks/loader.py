"""Tasks from YAML files, bundled or the user's own; a mistake in one is found when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from zotune.io import safe_yaml
from zotune.io.failures import LONGEST
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened
from zotune.tasks import schema
from zotune.tasks.metrics import ANSWER_METRICS, METRICS
from zotune.tasks.task import ANSWER, Task
from zotune.tasks.template import CHANGES, columns_of

_REQUIRED = ("name", "columns", "templates")


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
    return task_of(read(name_or_path), str(name_or_path), template, options)


def task_of(raw: Any, source: str, template: str | None = None, options: Sequence[str] | Mapping[Any, str] | None = None) -> Task:
    """The task of a task file's content; ``source`` names it in messages. Arguments and errors are those of :func:`load`."""
    try:
        task = _parse(raw, template)
        if options is not None and task.gold:
            raise ValueError("its answers are texts of each row, so it has no options to choose: leave options out.")
        if options is not None:
            task = replace(task, options=_options(options, task.labels, task.label_names))
        _check_join(task)
    except ValueError as error:
        raise ValueError(shortened(f"task {source}: {error}", LONGEST)) from None
    return task


def read(name_or_path: str | Path) -> Any:
    """The content of a task's YAML, unchecked; ValueError for an unknown task, or a file that is no YAML."""
    source = str(name_or_path)
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no task file {source}: give the path of a YAML file or one of {', '.join(names())}.")
        return safe_yaml.read(path, f"task file {source}")
    if source not in names():
        raise ValueError(
            f"unknown task {source!r}{did_you_mean(source, names())}; list them with `zotune tasks` or give the path of your own YAML file."
        )
    return safe_yaml.parse((_folder() / f"{source}.yaml").read_text(encoding="utf-8"), f"task file {source}")


def _folder() -> Traversable:
    return resources.files("zotune.tasks")


def _parse(raw: Any, chosen: str | None) -> Task:
    if not isinstance(raw, dict):
        raise ValueError("the file must hold a mapping of keys such as name, columns, label, labels, templates.")
    schema.check(raw)
    raw = {key: value for key, value in raw.items() if value is not None}
    gold = _gold(raw)
    for key in _REQUIRED if gold else (*_REQUIRED, "label", "labels"):
        if not raw.get(key):
            raise ValueError(f"the key {key!r} is missing.")
    columns = tuple(raw["columns"])
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
    columns_of(prompt)  # finds malformed placeholders before the first row

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
        max_new_tokens=raw.get("max_new_tokens", 50) if generation else None,
        length_normalize=bool(raw.get("length_normalize", False)),
    )


def _gold(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Column and field of the right answers; () for a task with labels."""
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


def _check_answer(template: Any, derived: Mapping[str, Any]) -> None:
    """The template of an answer must hold the answer, itself or in a derived column."""
    if not isinstance(template, str):
        raise ValueError("a task with 'answers' writes them by one text, e.g. answer: \" {answer}\".")
    holding = {ANSWER} | {
        name for name, rule in derived.items() if any(ANSWER in columns_of(new) for new in (rule.get("replace") or {}).values())
    }
    if not holding & set(columns_of(template)):
        raise ValueError(f"the answer {template!r} does not hold {{answer}}, the answer's own text.")


def _template_parts(raw: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """Prompt and options of a template: a string (with the task's `options`), or a mapping of both."""
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
        raise ValueError(f"two options are the same in {list(texts)}; they cannot be distinguished.")
    return texts


def _check_derived(derived: Any, columns: Sequence[str]) -> None:
    for name, rule in derived.items():
        if not set(rule) <= {"column", "map", "apply", "replace"} or "column" not in rule:
            raise ValueError(f"derived column {name!r} needs 'column' and 'map', 'apply' or 'replace'.")
        if rule["column"] not in columns:
            raise ValueError(f"derived column {name!r} comes from {rule['column']!r}, which is not in 'columns'.")
        for change in rule.get("apply", ()):
            if change not in CHANGES:
                raise ValueError(f"unknown change {change!r}{did_you_mean(change, CHANGES)}; there are {', '.join(CHANGES)}.")
        for new in rule.get("replace", {}).values():
            for column in columns_of(new):
                if column not in columns:
                    raise ValueError(
                        f"derived column {name!r} puts in {column!r}, which is not in 'columns'{did_you_mean(column, columns)}."
                    )


def _check_join(task: Task) -> None:
    """ValueError where prompt and option join two words: "… It was" + "great"."""
    if task.has_mask:  # a label word stands at the mask
        return
    end, words = task.prompt[-1:], " ".join(task.prompt.split()[-2:])
    ends_in_text = end.isascii() and (end.isalnum() or (end and end in '.,:;!?}"'))
    for option in task.options:
        if ends_in_text and option[0].isascii() and option[0].isalnum():
            raise ValueError(
                f"the prompt ends in {words!r} and the option {option!r} starts without a blank, so they would read "
                f"{words + option!r}: write the option as {' ' + option!r}."
            )
