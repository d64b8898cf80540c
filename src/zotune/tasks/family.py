"""What a family of rows is: :class:`Family`, and what one is prepared from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zotune.tasks.encoding import Encoder
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.rows import Rows
from zotune.tasks.task import Task

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Rows of one form, and how they become batches.

    Attributes:
        kind: of the model that they are for.
        train_objective, eval_objective: names of losses.
        encode: rows, and whether they are evaluated on → examples.
        collate_train, collate_eval: examples → batch.
        compute_metrics: of predictions; its attribute ``metrics`` names them, the main one first.
        ids: an example's lists of token ids.
        files: JSON files that are saved with the model, by name.
        processor: saved with the model in place of the tokenizer; None: the tokenizer is.
    """

    kind: ModelKind
    train_objective: str
    eval_objective: str
    encode: Callable[[Rows, bool], list[dict[str, Any]]]
    collate_train: Collate
    collate_eval: Collate
    compute_metrics: Any
    ids: Callable[[Mapping[str, Any]], Sequence[Sequence[int]]] = lambda example: (example["input_ids"],)
    files: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = None


@dataclass(frozen=True)
class FamilyInputs:
    """What families are prepared from.

    Attributes:
        encoder: tokenizer and length limit.
        config: the model's configuration.
        train_rows, eval_rows: all that were read; None where there are none.
        padding: arguments of collators.
        problem_type: given for a classification head.
        task: whose rows they are; None without one.
    """

    encoder: Encoder
    config: Any
    train_rows: Rows | None
    eval_rows: Rows | None
    padding: Mapping[str, Any]
    problem_type: str | None = None
    task: Task | None = None

    @property
    def rows(self) -> Rows:
        """The rows to train on, else those to evaluate on."""
        found = self.train_rows if self.train_rows is not None else self.eval_rows
        assert found is not None, "there are rows"
        return found
