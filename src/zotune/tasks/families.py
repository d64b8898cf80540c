"""Rows without a task for models other than causal language models: which family of rows they are, and what prepares it."""

from __future__ import annotations

from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks import images, labelled, sentence_pairs, seq2seq, token_labels
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.objective_choice import is_encoder, is_seq2seq
from zotune.tasks.rows import Rows
from zotune.tasks.task import Task


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
    found = {"labelled": labelled, "pairs": sentence_pairs, "images": images, "seq2seq": seq2seq, "tokens": token_labels}
    return found[name].prepare(inputs)
