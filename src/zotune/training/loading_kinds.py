"""The classes of transformers that kinds of models are loaded by, their heads, and what their files may lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from zotune.tasks.model_kind import REGRESSION, SINGLE, ModelKind, has_head

_LOADERS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classifier": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
    "image-text": "AutoModelForImageTextToText",
    "image-classifier": "AutoModelForImageClassification",
    "audio-classifier": "AutoModelForAudioClassification",
}
_INCOMPLETE = {
    "causal": "{} is not a complete language model: its files lack {}.",
    "masked": "{} has no complete head of a masked language model, its files lack {}: take a checkpoint with one, or --objective "
    "classifier.",
    "seq2seq": "{} is not a complete encoder-decoder language model: its files lack {}.",
    "embedding": "{} is not a complete encoder: its files lack {}.",
    "image-text": "{} is not a complete model of images and text: its files lack {}.",
}


def loader_of(kind: ModelKind, config: Any, name: str) -> Any:
    """The class of transformers whose ``from_pretrained`` loads a kind of model; ValueError where the model is not of that kind."""
    import transformers

    loader = getattr(transformers, _LOADERS[kind.name])
    known = getattr(loader, "_model_mapping", {})
    own_code = bool(getattr(config, "auto_map", None))
    if not own_code and type(config) not in known:
        raise ValueError(f"{name} is a {config.model_type}, which {loader.__name__} does not load: take another model, or other data.")
    return loader


def set_head(config: Any, kind: ModelKind, name: str) -> None:
    """Give a configuration the outputs of a new head; ValueError where the model called ``name`` has a head for others."""
    if has_head(config, kind.name):
        if config.num_labels != len(kind.labels):
            raise ValueError(
                f"{name} has a classification head for {config.num_labels} classes, and the task has {len(kind.labels)}."
                if kind.problem is None
                else f"{name} has a head with {config.num_labels} outputs, and the labels need {len(kind.labels)}: take the model without "
                "its head, or other labels."
            )
        then = config.problem_type or (REGRESSION if config.num_labels == 1 else None)
        if kind.problem is not None and then not in (None, kind.problem):
            raise ValueError(f"{name} has a head for {then}, and the labels are those of {kind.problem}: take the model without its head.")
        return
    config.num_labels = len(kind.labels)
    config.id2label = dict(enumerate(kind.labels))
    config.label2id = {label: index for index, label in enumerate(kind.labels)}
    config.problem_type = None if kind.problem == SINGLE else kind.problem


def checked_missing(model: nn.Module, missing: list[str], kind: ModelKind, name: str) -> list[str]:
    """The parameters that were drawn at random; ValueError where they are more than a new head.

    The pooler of an encoder that is used for its token states is never read: it is not trained, and left out where the files lack it.
    """
    if kind.name == "embedding":
        missing = _without_pooler(model, missing)
    if missing and not kind.has_new_head:
        raise ValueError(_INCOMPLETE[kind.name].format(name, ", ".join(missing[:3])))
    return missing


def _without_pooler(model: nn.Module, missing: Sequence[str]) -> list[str]:
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return list(missing)
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # type: ignore[assignment]
    for parameter in pooler.parameters():
        parameter.unread = True  # type: ignore[attr-defined]
    return [name for name in missing if not name.startswith("pooler.")]
