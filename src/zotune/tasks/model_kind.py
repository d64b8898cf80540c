"""As what a model is loaded for the data of a run: :class:`ModelKind`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Kinds of models: language models of a decoder, of an encoder, of both; heads for texts and for tokens; encoders alone; images and text;
#: heads for images and for sound.
KINDS = ("causal", "masked", "seq2seq", "classifier", "tokens", "embedding", "image-text", "image-classifier", "audio-classifier")
#: How the name of an architecture with the head of a kind ends.
HEADS: dict[str, str | tuple[str, ...]] = {
    "classifier": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "image-classifier": "ForImageClassification",
    "audio-classifier": ("ForAudioClassification", "ForSequenceClassification"),
}
#: Problems of a classification head, as ``config.problem_type`` of transformers names them.
REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"
PROBLEMS = (REGRESSION, SINGLE, MULTI)


@dataclass(frozen=True)
class ModelKind:
    """What a model computes.

    Attributes:
        name: one of :data:`KINDS`.
        labels: names of a head's outputs, in order.
        problem: of a head for texts, images or sound, one of :data:`PROBLEMS`; None: as the labels of a batch say.
    """

    name: str = "causal"
    labels: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def has_new_head(self) -> bool:
        """Whether a head is drawn at random where the model's files have none."""
        return self.name in HEADS

    def to_record(self) -> dict[str, Any]:
        """The entry of a run's file."""
        return {"name": self.name, "labels": list(self.labels), "problem": self.problem}


def has_head(config: Any, kind: str) -> bool:
    """Whether a model's files hold the head of a kind."""
    return any(name.endswith(HEADS[kind]) for name in getattr(config, "architectures", None) or ())


def kind_of_record(record: Mapping[str, Any], place: Any) -> ModelKind:
    """The kind of the model of a run, by the content of its file; ValueError, with its ``place``, where it is none."""
    found = record.get("kind")
    if not found:  # of an earlier version
        classes = record.get("classes")
        found = {"name": "classifier" if classes else "masked" if record.get("masked") is True else "causal", "labels": classes or []}
    labels = found.get("labels", []) if isinstance(found, dict) else None
    if labels is None or found.get("name") not in KINDS or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"{place} is damaged: its kind of model is none of {', '.join(KINDS)}.")
    if found.get("problem") not in (None, *PROBLEMS):
        raise ValueError(f"{place} is damaged: its kind of problem is none of {', '.join(PROBLEMS)}.")
    return ModelKind(found["name"], tuple(labels), found.get("problem"))
