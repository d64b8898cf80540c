"""A task: its data set, its prompt template, its answers and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zotune.tasks.template import CHANGES, check_length, columns_of, pieces, render, text_of

Row = Mapping[str, Any]

#: Column of the answer's text, while an answer is rendered.
ANSWER = "answer"
#: The mask in a prompt, whichever token a tokenizer has for it.
MASK = "<mask>"


@dataclass(frozen=True)
class Task:
    """A task with one of its prompt templates.

    Three kinds: classification and multiple choice with a label (`labels`, `options`); multiple choice among candidates in the row (`gold`,
    `candidates`); generation (`gold` alone).

    Attributes:
        name, title, citation: the name, a one-line description, the source.
        hub, subset: data set id and configuration on the Hugging Face hub.
        splits: ``train`` and ``eval`` -> split name, on the hub and as the stem of a local file.
        files: ``train`` and ``eval`` -> stem of the local file, where it differs from the split's name.
        columns: columns every row must have, besides the label.
        derived: columns computed from those, by a map of values or by named text changes.
        encoder: one or two templates, the input of a sequence-classification model.
        label_column: column of the right answer, or of the right answers' texts.
        labels, label_names: value in that column and class name of each option, in option order.
        drop_labels: label values of rows without a gold label, which are dropped.
        gold: column (and field) of the right answers' texts; empty for a task with labels.
        candidates: column of a row's options.
        max_new_tokens: longest generated answer, in tokens.
        template: name of the chosen template (``"custom"`` for a user's own).
        prompt, options: texts of the template, themselves templates; a leading blank belongs to the option. With `gold` the only option is
            the template of an answer, ``{answer}``.
        length_normalize: whether an option's score is its log-likelihood divided by its number of tokens.
        templates: names of the bundled templates.
        metrics: names of the metrics, the main one first.
        preamble: text before every prompt, such as demonstrations.
        preamble_of: row -> text before its prompt, in place of `preamble`.
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
    preamble: str = ""
    preamble_of: Callable[[Row], str] | None = None

    def render(self, row: Row) -> tuple[str, tuple[str, ...]]:
        """Prompt and answer options of a row (for generation its right answers); trailing blanks of the prompt move to the options."""
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
        return self.demonstrations(row) + bare, options

    def demonstrations(self, row: Row) -> str:
        """The text before a row's prompt."""
        return self.preamble if self.preamble_of is None else self.preamble_of(row)

    def render_filled(self, row: Row) -> str:
        """The prompt of a row with its label word, and a blank before it, at the mask."""
        before, after = self.prompt.split(MASK)
        word = self.options[self.answer(row)].strip()
        row = self._complete(row)
        return f"{render(before, row).rstrip(' ')} {word}{render(after, row)}"

    def pieces(self, row: Row) -> list[tuple[str | None, str]]:
        """The prompt of a row in pieces, (column or None, text); see :func:`zotune.tasks.template.pieces`."""
        return pieces(self.prompt, self._complete(row))

    def encoder_texts(self, row: Row) -> tuple[str, ...]:
        """The one or two texts that a sequence-classification model reads."""
        row = self._complete(row)
        return tuple(render(template, row) for template in self.encoder)

    def answer(self, row: Row) -> int:
        """Index of the (first) right option, from a label's value or class name; ValueError for an unknown label."""
        if self.gold:
            return self.right(row)[0]
        label = row[self.label_column]
        for index, (value, name) in enumerate(zip(self.labels, self.label_names, strict=True)):
            if label in (value, name):
                return index
        if str(label) in (texts := [str(value) for value in self.labels]):  # a table of text has '1' for 1
            return texts.index(str(label))
        known = ", ".join(f"{v!r} ({n})" for v, n in zip(self.labels, self.label_names, strict=True))
        raise ValueError(f"column {self.label_column!r} holds {label!r}, which is none of the options {known}.")

    def right(self, row: Row) -> tuple[int, ...]:
        """Indices of all right options, in the order of the right answers; training uses the first (MeZO's code, 2305.17333)."""
        if not self.gold:
            return (self.answer(row),)
        if not self.candidates:
            return tuple(range(len(self.references(row))))
        references, candidates = self.references(row), self._candidates(row)
        found = tuple(candidates.index(text) for text in references if text in candidates)
        if not found:
            raise ValueError(f"none of the right answers {list(references)} is among the row's {self.candidates!r}.")
        return found

    def references(self, row: Row) -> tuple[str, ...]:
        """Distinct texts of the right answers; with labels the text of the right option."""
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
        """Whether answers are generated, not chosen."""
        return bool(self.gold) and self.candidates is None

    @property
    def fixed_options(self) -> bool:
        """Whether all rows have the same options, so that a classifier has one class per option."""
        return not self.gold and not any(columns_of(option) for option in self.options)

    @property
    def has_mask(self) -> bool:
        """Whether the prompt has a mask, at which label words are scored."""
        return MASK in self.prompt

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
                continue  # a column for answers, while rendering the prompt
            for old, new in replacements.items():
                rendered = render(new, row)
                check_length(len(text) + text.count(old) * len(rendered))
                text = text.replace(old, rendered)
            full[name] = text
        return full


def _texts(values: Any) -> tuple[str, ...]:
    """The distinct texts of a list, stripped, in order; () for anything else."""
    if not isinstance(values, (list, tuple)):
        return ()
    return tuple(dict.fromkeys(text for value in values if (text := str(value).strip())))
