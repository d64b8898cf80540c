"""Rows of similar sentences for embedding models, and the files by which sentence-transformers loads the result.

``{"anchor": ..., "positive": ...[, "negative": ...]}`` to rank, or ``{"sentence1": ..., "sentence2": ..., "score": 0.8}``, similarities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.io.text import read_text
from zotune.tasks.collators import Collator, padded
from zotune.tasks.encoding import Encoder
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.head_labels import read_labels
from zotune.tasks.head_metrics import pearson, spearman
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.rows import Rows

#: Columns of rows that are ranked, and of rows with similarities.
RANKED, SCORED = ("anchor", "positive"), ("sentence1", "sentence2", "score")
MODULES, POOLING = "modules.json", "1_Pooling/config.json"
#: Bytes that a file of sentence-transformers may have.
LONGEST = 1 << 20
#: What a run's folder holds for sentence-transformers.
FILES = (MODULES, POOLING, "sentence_bert_config.json", "config_sentence_transformers.json")
_TYPES = {"": "Transformer", "1_Pooling": "Pooling"}


@dataclass(frozen=True)
class PairCollator(Collator):
    """Batches for ``ContrastiveLoss`` and ``SimilarityLoss``: input_ids, attention_mask and pooled (B, P, T), and score (B,) where given.

    Attributes:
        first_token: whether an embedding is the state of a text's first token; else it is the mean over its tokens.
    """

    first_token: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [ids for example in examples for ids in example["texts"]]
        inputs = self._inputs(texts)
        length = inputs["input_ids"].shape[1]
        pooled = padded([[1]] * len(texts), length, 0) if self.first_token else inputs["attention_mask"]
        shape = (len(examples), -1, length)
        batch = {name: tensor.view(shape) for name, tensor in (inputs | {"pooled": pooled}).items()}
        if "score" in examples[0]:
            batch["score"] = torch.tensor([example["score"] for example in examples])
        return batch


@dataclass(frozen=True)
class ComputePairMetrics:
    """Callable for ``transformers.Trainer(compute_metrics=...)``: embeddings (N, 2, d) and scores (N,) -> named floats.

    Of ranked rows ``accuracy`` is the share of anchors whose nearest positive, of all N, is their own; ``mrr`` the mean of 1 / its rank.

    Attributes:
        metrics: names, the main one first.
    """

    metrics: Sequence[str]

    def __call__(self, prediction: Any) -> dict[str, float]:
        found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        unit = found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-12)
        if "accuracy" not in self.metrics:
            cosines, scores = (unit[:, 0] * unit[:, 1]).sum(axis=1), np.asarray(prediction.label_ids)
            return {"spearman": spearman(cosines, scores), "pearson": pearson(cosines, scores)}
        cosines = unit[:, 0] @ unit[:, 1].T
        ranks = 1 + (cosines > np.diag(cosines)[:, None]).sum(axis=1)
        return {"accuracy": float(np.mean(ranks == 1)), "mrr": float(np.mean(1 / ranks))}


def prepare(inputs: FamilyInputs) -> Family:
    """The family of pairs; ValueError where the model's own pooling is neither a mean nor the first token."""
    encoder, rows = inputs.encoder, inputs.rows
    files = _files(inputs.config, encoder)
    pooling = files[POOLING]
    first = bool(pooling.get("pooling_mode_cls_token")) or pooling.get("pooling_mode") == "cls"
    objective, _ = _form(rows)

    def encode(rows: Rows, evaluated: bool) -> list[dict[str, Any]]:
        form, columns = _form(rows)
        if not evaluated and form != objective:
            raise ValueError(f"{rows.source} has other columns than the rows to train on: give both alike.")

        def example(row: Mapping[str, Any]) -> dict[str, Any]:
            for column in columns:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(f"column {column!r} holds no sentence.")
            texts = [encoder.whole(row[column], what=f"text in {column!r}")["input_ids"] for column in columns]
            return {"texts": texts} if form == "contrastive" else {"texts": texts, "score": _score(read_labels([row["score"]])[0])}

        return encoder.map_rows(rows, example)

    judged = _form(inputs.eval_rows)[0] if inputs.eval_rows is not None else objective
    metrics = ComputePairMetrics(("accuracy", "mrr") if judged == "contrastive" else ("spearman", "pearson"))
    collate = PairCollator(**inputs.padding, first_token=first)
    texts = lambda example: example["texts"]  # noqa: E731
    return Family(ModelKind("embedding"), objective, judged, encode, collate, collate, metrics, texts, files)


def _form(rows: Rows) -> tuple[str, tuple[str, ...]]:
    """The objective of rows, and their columns of texts."""
    columns = set(rows.columns)
    if set(RANKED) <= columns:
        return "contrastive", (*RANKED, *(("negative",) if "negative" in columns else ()))
    if set(SCORED) <= columns:
        return "similarity", SCORED[:2]
    raise ValueError(f"{rows.source} needs the columns {' and '.join(RANKED)}, or {', '.join(SCORED)}: every row has {', '.join(columns)}.")


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise ValueError(f"column 'score' holds {value!r}, and a similarity is a number from -1 to 1: divide the scores by the largest.")
    return float(value)


def _files(config: Any, encoder: Encoder) -> dict[str, Any]:
    """What sentence-transformers reads beside the model: of the model's own folder, else of a mean over the tokens."""
    folder = Path(getattr(config, "_name_or_path", "") or "-")
    if not (folder / MODULES).is_file():
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(_TYPES.items())
        ]
        mean = {"word_embedding_dimension": config.hidden_size, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
        return {MODULES: modules, POOLING: mean, "sentence_bert_config.json": {"max_seq_length": encoder.limit, "do_lower_case": False}}
    found = {MODULES: _json(folder / MODULES)}
    for name in FILES[1:]:
        if (folder / name).is_file():
            found[name] = _json(folder / name)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in found[MODULES] if isinstance(module, dict)]
    pooling: Any = found.get(POOLING)
    modes = {name for name, chosen in pooling.items() if name.startswith("pooling_mode") and chosen} if isinstance(pooling, dict) else set()
    named = pooling.get("pooling_mode") if isinstance(pooling, dict) else None
    plain = modes <= {"pooling_mode"} and named in ("mean", "cls")
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise ValueError(
            f"{folder} has the modules {', '.join(kinds)}: sentence embeddings are trained of Transformer, Pooling and Normalize."
        )
    if not plain and modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise ValueError(f"{folder / POOLING} pools by {', '.join(sorted(modes)) or 'nothing'}: mean_tokens and cls_token are known here.")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, LONGEST))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
