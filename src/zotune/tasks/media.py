"""Rows of an image, or of a sound, with a label: a class, a number, or several labels, for a classification head.

``{"file_name": "cat.png", "label": "cat"}``, the metadata file of an image or audio folder. File names are relative to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.head_labels import head_labels
from zotune.tasks.media_files import file_beside, read_image, read_sound
from zotune.tasks.rows import Rows

#: What the models of a kind take in, as a message calls it.
WHAT = {"image-classifier": "image", "audio-classifier": "sound"}


def media_kind(config: Any) -> str | None:
    """The kind of a model that classifies images or sound, and reads no text; None: of another model."""
    from transformers import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING as AUDIO
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as IMAGES
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as TEXTS

    if type(config) in AUDIO:
        return "audio-classifier"
    return "image-classifier" if type(config) in IMAGES and type(config) not in TEXTS else None


@dataclass(frozen=True)
class MediaCollator:
    """Batches for ``MediaLoss``: what the model's processor makes of images or sounds, and labels.

    Sounds are padded to the longest of a batch, or as long as the processor makes all.

    Attributes:
        kind: of the model.
        processor: of the model: an image processor, or a feature extractor.
    """

    kind: str
    processor: Any

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        paths = [example["file"] for example in examples]
        if self.kind == "image-classifier":
            found = self.processor(images=[read_image(path) for path in paths], return_tensors="pt")
        else:
            rate = self.processor.sampling_rate
            sounds = [read_sound(path, rate) for path in paths]
            try:
                found = self.processor(sounds, sampling_rate=rate, return_tensors="pt", padding=_padding(self.processor))
            except (ValueError, RuntimeError, AssertionError) as error:
                raise ValueError(f"the model's processor makes nothing of {paths[0]}: {' '.join(str(error).split())}") from None
        batch = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        return {**batch, "labels": torch.tensor([example["label"] for example in examples])}


def prepare(inputs: FamilyInputs) -> Family:
    """The family of images or sounds with labels; ValueError where the model's folder has no processor, or labels fit no head."""
    kind = media_kind(inputs.config)
    assert kind is not None, "the rows are for such a model"
    processor, labels = _processor(inputs.config, kind), head_labels(inputs, kind)
    collate = MediaCollator(kind, processor)

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        rows.require(["file_name", labels.column])

        def example(row: Mapping[str, Any]) -> dict[str, Any]:
            return {"file": str(file_beside(rows.source, row["file_name"], WHAT[kind])), "label": labels.of(row)}

        examples = inputs.encoder.map_rows(rows, example)
        collate(examples[:1])  # a folder that cannot be read is seen before the model is
        return examples

    return Family(labels.kind(kind), "media", "media", encode, collate, collate, labels.metrics, ids=lambda _: (), processor=processor)


def _padding(processor: Any) -> str | bool:
    """Of sounds: Whisper's models take one length alone."""
    return "max_length" if hasattr(processor, "nb_max_frames") else True


def _processor(config: Any, kind: str) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    name = getattr(config, "_name_or_path", "")
    loader = AutoImageProcessor if kind == "image-classifier" else AutoFeatureExtractor
    try:
        found = loader.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} has no processor of {WHAT[kind]}s that can be loaded: {' '.join(str(error).split())[:300]}") from None
    if kind == "audio-classifier" and not hasattr(found, "sampling_rate"):
        raise ValueError(f"{name} has a {type(found).__name__}, which processes no sound: give the folder its feature extractor's files.")
    return found
