"""What is searched: templates, and label words for each class, from a file or from the built-in variations of a task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from zotune.io import safe_yaml
from zotune.io.suggest import did_you_mean
from zotune.io.text import shown
from zotune.prompting.candidate import check_prompt
from zotune.tasks import Task, load
from zotune.tasks.task import MASK

#: Most templates, and most label words of a class.
MOST_TEMPLATES, MOST_WORDS = 1000, 100
KEYS = ("templates", "words")


@dataclass(frozen=True)
class Space:
    """Templates, and the label words of each class in label order; ``built_in_words``: whether no file lists these."""

    templates: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    built_in_words: bool = False

    @property
    def size(self) -> int:
        """Number of candidates: each template with one word of each class."""
        return len(self.templates) * math.prod(map(len, self.words))


def space_of(source: str | Path, task: Task, file: str | Path | None, *, masked: bool) -> Space:
    """The candidates of a file; without one, or where it has only one of the two keys, the built-in ones.

    Args:
        source: name or path of the task.
        task: the same, loaded.
        file: YAML with ``templates``, a list of prompts, and ``words``, label (or class name) -> list of label words.
        masked: whether a masked language model reads the prompts.

    Raises:
        ValueError: the file has another form, or a template or word is invalid.
    """
    content: Mapping[str, Any] = {} if file is None else _read(file)
    templates, words = content.get("templates"), content.get("words")
    try:
        prompts = _templates(source, task, masked) if templates is None else _listed(templates, "templates", MOST_TEMPLATES)
        for prompt in prompts:
            check_prompt(prompt, task, masked=masked)
        if words is not None and not task.fixed_options:
            raise ValueError(f"the options of task {task.name!r} are texts of each row, so it has no label words: leave words out.")
        groups = _words(source, task, masked) if words is None else _words_of(words, task)
    except ValueError as error:
        raise error if file is None else ValueError(f"{file}: {error}") from None
    return Space(prompts, groups, built_in_words=words is None)


def _read(file: str | Path) -> Mapping[str, Any]:
    content = safe_yaml.read(Path(file).expanduser(), file)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: expected a mapping with 'templates', a list of prompts, 'words', label words for each class, or both.")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{file}: unknown key {shown(key)}{did_you_mean(key, KEYS)}; there are {', '.join(KEYS)}.")
    return content


def _listed(value: Any, name: str, most: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError(f"{name} must be a list of texts, one or more.")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} entries, and at most {most} are possible.")
    return tuple(dict.fromkeys(value))


def _words_of(value: Any, task: Task) -> tuple[tuple[str, ...], ...]:
    names = [*zip(map(str, task.labels), task.label_names, strict=True)]
    if not isinstance(value, dict):
        raise ValueError(f"words must map each of {', '.join(task.label_names)} to a list of label words.")
    by_key = {str(key): words for key, words in value.items()}
    groups = []
    for label, name in names:
        words = by_key.pop(label, by_key.pop(name, None))
        if not words:
            raise ValueError(f"the class {name!r} has no label words: list one or more under words.")
        groups.append(_listed(words, f"the label words of {name!r}", MOST_WORDS))
    if by_key:
        raise ValueError(f"words names {', '.join(by_key)}, and the classes are {', '.join(task.label_names)}.")
    return tuple(groups)


def _templates(source: str | Path, task: Task, masked: bool) -> tuple[str, ...]:
    """The task's own templates, and its columns between the built-in texts."""
    prompts = [prompt for prompt, _ in _own(source, task, masked)]
    if task.fixed_options:
        body = "\n".join(f"{{{column}}}" for column in task.columns)
        mask = f" {MASK}." if masked else ""
        prompts += [f"{before}{body}{after}{mask}" for before in _variations()["before"] for after in _variations()["after"]]
        prompts += [f"{MASK}: {body}", f"{MASK} news: {body}"] if masked else []
    return tuple(dict.fromkeys(prompts))


def _words(source: str | Path, task: Task, masked: bool) -> tuple[tuple[str, ...], ...]:
    """For each class the words of the task's own templates and its name, with a small and a capital letter, and other words for it."""
    if not task.fixed_options:
        return tuple((option,) for option in task.options)
    own = [options for _, options in _own(source, task, masked)] + [task.options]
    groups = []
    for index, name in enumerate(task.label_names):
        words = [options[index].strip(" ") for options in own]
        words += [name] if name.replace("/", "").isalpha() else []
        others = _variations()["words"].get(name, [])
        groups.append(tuple(dict.fromkeys([*_cases(words), *others]))[:MOST_WORDS])
    return tuple(groups)


def _own(source: str | Path, task: Task, masked: bool) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, options) of the task's own templates that this kind of model reads."""
    loaded = [load(source, template=name) for name in task.templates]
    return [(each.prompt, each.options) for each in loaded if each.has_mask is masked]


def _cases(words: Iterable[str]) -> list[str]:
    found = list(words)
    return [*found, *(word[:1].lower() + word[1:] for word in found), *(word[:1].upper() + word[1:] for word in found)]


def _variations() -> Mapping[str, Any]:
    text = (resources.files("zotune.prompting") / "variations.yaml").read_text(encoding="utf-8")
    return safe_yaml.parse(text, "variations.yaml")


def distinct(words: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The words of all classes, each once."""
    return tuple(dict.fromkeys(word for group in words for word in group))
