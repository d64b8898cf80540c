"""Rows without a task for models other than causal language models: which family of rows they are, and what prepares it."""

from __future__ import annotations

from typing import Any

from zotune.io.suggest import did_you_mean
from zotune.tasks import images, labelled, media, sentence_pairs, seq2seq, token_labels
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.objective_choice import is_encoder, is_seq2seq
from zotune.tasks.rows import Rows
from zotune.tasks.task import Task


def family_name(config: Any, task: Task | None, objective: str | None, rows: Rows | None) -> str | None:
    """The family of rows for a model; None: of a causal language model, or a task of an encoder.

    Raises:
        ValueError: the rows are none that the model can be trained on.
    """
    kind = media.media_kind(config)
    if kind is not None:
        return _media(media.WHAT[kind], config, task, objective, rows)
    if rows is None or objective in ("mlm", "reward", "choices", "accuracy"):
        return None
    columns = set(rows.columns)
    if "file_name" in columns and columns <= {"file_name", "label", "labels"}:
        raise ValueError(
            f"{rows.source} names files of images or sound, and {config.model_type if config is not None else 'the model'} reads text: "
            "take a model that classifies those, or rows with text."
        )
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


def _media(what: str, config: Any, task: Task | None, objective: str | None, rows: Rows | None) -> str:
    """ "media"; ValueError where there is no image, or no sound, with a label."""
    needs = f"{config.model_type} classifies {what}s, and needs rows with file_name and label"
    if task is not None:
        raise ValueError(f"{needs}: leave --task out, and pass --train_file.")
    if objective not in (None, "classifier"):
        raise ValueError(f"{needs}, whose loss is the head's: leave the objective {objective!r} out.")
    columns = () if rows is None else rows.columns
    if rows is not None and not ("file_name" in columns and {"label", "labels"} & set(columns)):
        missing = "file_name" if "file_name" not in columns else "label"
        raise ValueError(f"{needs}: {rows.source} has {', '.join(columns)}{did_you_mean(missing, sorted(columns))}.")
    return "media"


def check_idle(form: str | None, *, what: str = "prompts and chats of causal language models", **given: Any) -> None:
    """ValueError for a given option of the named ``what`` that a family of rows has none of."""
    for name, value in given.items():
        if form is not None and value:
            raise ValueError(f"{name} would have no effect: it is of {what}; leave it out.")


def prepare_family(name: str, inputs: FamilyInputs) -> Family:
    """A family of :func:`family_name`; ValueError where its rows are malformed."""
    found = {"labelled": labelled, "media": media, "pairs": sentence_pairs, "images": images, "seq2seq": seq2seq, "tokens": token_labels}
    return found[name].prepare(inputs)
