"""Rows of a text, or a pair of texts, with a label: a class, a number, or several labels, for a classification head.

``{"text": ..., "label": ...}``, with ``text_pair`` for pairs, ``labels`` for lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.tasks.collators import ClassifierCollator
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.head_labels import head_labels
from zotune.tasks.rows import Rows


def prepare(inputs: FamilyInputs) -> Family:
    """The family of labelled rows; ValueError where labels fit no head."""
    rows, encoder = inputs.rows, inputs.encoder
    labels = head_labels(inputs, "classifier")
    paired = "text_pair" in rows.columns

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        rows.require(["text", labels.column, *(["text_pair"] if paired else [])])

        def example(row: Mapping[str, Any]) -> dict[str, Any]:
            texts = [row["text"], row["text_pair"]] if paired else [row["text"]]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"column {'text_pair' if isinstance(texts[0], str) else 'text'!r} holds no string.")
            return {**encoder.whole(*texts), "label": labels.of(row)}

        return encoder.map_rows(rows, example)

    collate = ClassifierCollator(**inputs.padding)
    return Family(labels.kind("classifier"), "classifier", "classifier", encode, collate, collate, labels.metrics)
