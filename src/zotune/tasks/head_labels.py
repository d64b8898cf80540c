"""Labels of a classification head: a class, a number, or several labels a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zotune.tasks.family import FamilyInputs
from zotune.tasks.head_metrics import ComputeHeadMetrics
from zotune.tasks.model_kind import MULTI, PROBLEMS, REGRESSION, SINGLE, ModelKind, has_head

METRICS = {SINGLE: ("accuracy", "f1"), REGRESSION: ("pearson", "spearman", "mse"), MULTI: ("micro_f1", "macro_f1")}
#: What a label of each problem is.
_LABELS = {
    SINGLE: "a name or a whole number",
    REGRESSION: "a number, or a list of numbers",
    MULTI: "a list of names, or of 0.0 or 1.0 for every output",
}


@dataclass(frozen=True)
class HeadLabels:
    """How the labels of rows are read for a head.

    Attributes:
        column: ``"label"`` or ``"labels"``.
        problem: as transformers names it.
        names: of the head's outputs, in order.
    """

    column: str
    problem: str
    names: tuple[str, ...]

    def of(self, row: Mapping[str, Any]) -> Any:
        """The label of a row as a model takes it: a class, a number or a list of numbers; ValueError for what is none."""
        return _label(_cell(row[self.column], self.problem), self.problem, self._index, self.column)

    def kind(self, name: str) -> ModelKind:
        """The kind of the model, a name of :data:`zotune.tasks.model_kind.KINDS`."""
        return ModelKind(name, self.names, self.problem)

    @property
    def metrics(self) -> ComputeHeadMetrics:
        return ComputeHeadMetrics(self.problem, METRICS[self.problem])

    @cached_property  # read for every row
    def _index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def head_labels(inputs: FamilyInputs, kind: str) -> HeadLabels:
    """The labels of rows; the problem is that of ``problem_type``, else of the model's head, else the labels say it."""
    rows = inputs.rows
    column = "labels" if "labels" in rows.columns else "label"
    values = read_labels(rows.map(lambda row: row[column]))
    there = has_head(inputs.config, kind)
    problem = inputs.problem_type or (_of_head(inputs.config) if there else None) or _of_labels(values)
    return HeadLabels(column, problem, _names(problem, values, inputs, column, there))


def _of_head(config: Any) -> str | None:
    """The problem of the head that a model has, where it says so."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else None)


def _of_labels(values: Sequence[Any]) -> str:
    if all(isinstance(value, list) for value in values):
        numbers = [entry for value in values for entry in value if isinstance(entry, float)]
        return REGRESSION if any(entry not in (0.0, 1.0) for entry in numbers) else MULTI
    if all(_is_number(value) for value in values) and any(isinstance(value, float) for value in values):
        return REGRESSION
    return SINGLE


def read_labels(values: Sequence[Any]) -> list[Any]:
    """Labels, of which those of a table without types (CSV) are texts: numbers where all of them are, lists where they are JSON."""
    read = [_read(value) for value in values]
    alike = all(_is_number(value) for value in read) or all(isinstance(value, list) for value in read)
    return read if alike else list(values)


def _read(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"\s*(\[.*\]|[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*", value, re.DOTALL):
        return value
    try:
        return json.loads(value) if value.strip().startswith("[") else int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    except (ValueError, RecursionError):
        return value


def _cell(value: Any, problem: str) -> Any:
    return value if problem == SINGLE else _read(value)


def _names(problem: str, values: Sequence[Any], inputs: FamilyInputs, column: str, there: bool) -> tuple[str, ...]:
    """Names of the outputs: those of the model's head, else of the labels of all rows to train on."""
    config = inputs.config
    if there:
        return tuple(str(config.id2label[number]) for number in range(config.num_labels))
    outputs = {len(value) if isinstance(value, list) else 1 for value in values if isinstance(value, list) or _is_number(value)}
    if problem == REGRESSION or (problem == MULTI and not any(isinstance(entry, str) for value in values for entry in _listed(value))):
        if len(outputs) > 1:
            raise ValueError(f"{inputs.rows.source}: column {column!r} has {sorted(outputs)} numbers a row: give each row as many.")
        return tuple(f"LABEL_{number}" for number in range(max(outputs, default=1)))
    if problem == MULTI:
        return tuple(sorted({entry for value in values for entry in _listed(value) if isinstance(entry, str)}))
    found: set[Any] = set(values) if all(isinstance(value, str | int | float) for value in values) else {None}
    if not all(isinstance(entry, str | int) for entry in found):
        raise ValueError(f"{inputs.rows.source}: column {column!r} holds labels that are no classes: each is {_LABELS[SINGLE]}.")
    if len(found) < 2:
        raise ValueError(f"{inputs.rows.source}: column {column!r} has one label only, {next(iter(found), None)!r}: give rows of two.")
    numbers = all(isinstance(entry, int) for entry in found)
    return tuple(map(str, sorted(found) if numbers else sorted(map(str, found))))


def _label(value: Any, problem: str, index: Mapping[str, int], column: str) -> Any:
    """The label as a model takes it: a class, a number or a list of numbers."""
    if problem == SINGLE and isinstance(value, str | int):
        return class_number(value, index, column)
    if problem == REGRESSION:
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) == len(index) and all(map(_is_number, numbers)):
            return [float(number) for number in numbers] if len(index) > 1 else float(numbers[0])
    if problem == MULTI and isinstance(value, list):
        if any(isinstance(entry, str) for entry in value) or not value:
            chosen = {class_number(entry, index, column) for entry in value}
            return [float(number in chosen) for number in range(len(index))]
        if len(value) == len(index) and all(_is_number(entry) and entry in (0, 1) for entry in value):
            return [float(entry) for entry in value]
    of = f" for {len(index)} outputs" if problem != SINGLE else ""
    raise ValueError(f"column {column!r} holds {value!r}, and a label of {problem}{of} is {_LABELS[problem]}.")


def class_number(name: Any, index: Mapping[str, int], column: str) -> int:
    """The number of a class by its name, or as it is where no name is a number."""
    if str(name) in index:
        return index[str(name)]
    if _is_number(name) and isinstance(name, int) and 0 <= name < len(index) and not any(known.lstrip("-").isdigit() for known in index):
        return name
    raise ValueError(f"column {column!r} holds {name!r}, which is none of the classes {', '.join(index)}.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_problem(problem_type: str | None, family: str | None) -> None:
    """ValueError for an unknown problem of a head, or one that no head has."""
    if problem_type is None:
        return
    if problem_type not in PROBLEMS:
        raise ValueError(f"unknown problem_type {problem_type!r}: choose one of {', '.join(PROBLEMS)}.")
    if family not in ("labelled", "media"):
        raise ValueError(
            "problem_type is of a classification head on rows with text (or file_name) and label, and these are others: leave it out."
        )
