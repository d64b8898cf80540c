"""Rows without a task for models other than causal language models: which family of rows they are, and what prepares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks.encoding import Encoder
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.objective_choice import is_encoder, is_seq2seq
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


def family_name(config: Any, task: Task | None, objective: str | None, rows: Rows | None) -> str | None:
    """The family of rows for a model; None: of a causal language model, or a task of an encoder.

    Raises:
        ValueError: the rows are none that the model can be trained on.
    """
    if rows is None or objective in ("mlm", "reward", "choices", "accuracy"):
        return None
    columns = set(rows.columns)
    labelled = "text" in columns and bool(columns & {"label", "labels"})
    if is_seq2seq(config) and objective != "classifier":
        if task is None and not {"prompt", "completion"} <= columns:
            also = ", or --objective classifier" if labelled else ""
            raise ValueError(
                f"{config.model_type} is an encoder-decoder model, which is trained on rows with prompt and completion{also}: "
                f"{rows.source} has {', '.join(columns)}."
            )
        return "seq2seq"
    if task is not None:
        return None
    if objective is None and ({"anchor", "positive"} <= columns or {"sentence1", "sentence2", "score"} <= columns):
        return "pairs"
    if objective in (None, "lm") and "file_name" in columns and hasattr(config, "vision_config"):
        if not ("text" in columns or {"prompt", "completion"} <= columns):
            raise ValueError(f"{rows.source} has images, and needs the column text, or prompt and completion: it has {', '.join(columns)}.")
        return "images"
    if objective is None and "tokens" in columns and columns & {"tags", "ner_tags", "pos_tags"}:
        return "tokens"
    if (labelled and is_encoder(config)) or objective == "classifier":
        if not labelled:
            raise ValueError(
                f"{rows.source} has no labels for a classification head: give rows text and label, or pass --task "
                f"(a name or your own YAML file){did_you_mean('label', sorted(columns))}."
            )
        return "labelled"
    return None


def prepare_family(name: str, inputs: FamilyInputs) -> Family:
    """A family of :func:`family_name`; ValueError where its rows are malformed."""
    from zotune.tasks import images, labelled, sentence_pairs, seq2seq, token_labels

    found = {"labelled": labelled, "pairs": sentence_pairs, "images": images, "seq2seq": seq2seq, "tokens": token_labels}
    return found[name].prepare(inputs)
