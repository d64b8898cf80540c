"""A small workplace for the command line's tests: model, encoder, data, and files with one fault each."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, RobertaForMaskedLM

from zotune.cli.main import main

GOOD = ["fine", "warm", "sharp", "lovely"]
BAD = ["dull", "flat", "weak", "sour"]
OTHER = ["the", "a", "film", "plot", "cast", "This", "movie", "is", "It", "was", "In", "short", ":"]
OTHER += ["great", "terrible", "good", "bad", "really", "and"]
CONTEXT = 32


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> Result:
    """`zotune` with these words, in this process; the libraries' verbosity is put back afterwards."""
    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            code = main(list(words))
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
    return Result(code, *capsys.readouterr())


def weights_digest(folder: str | Path, name: str = "model.safetensors") -> str:
    return hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()


def save_model(folder: Path, **changes: Any) -> None:
    """A random Llama of two layers with a word tokenizer."""
    _save(folder, LlamaForCausalLM, "<s>", tie_word_embeddings=False, **changes)


def save_encoder(folder: Path, kind: type[PreTrainedModel] = BertModel, **changes: Any) -> None:
    """A random encoder without a classification head, a BERT body unless another ``kind`` is given."""
    _save(folder, kind, "[CLS]", **changes)


def save_masked(folder: Path, kind: type[PreTrainedModel] = RobertaForMaskedLM, **changes: Any) -> None:
    """A random masked language model whose tokenizer has a mask."""
    _save(folder, kind, "[CLS]", mask="[MASK]", pad_token_id=1, **changes)


def _save(folder: Path, kind: type[PreTrainedModel], start: str, mask: str | None = None, **changes: Any) -> None:
    tokenizer = word_tokenizer([start])
    if mask is not None:
        tokenizer.add_special_tokens({"mask_token": mask})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_data(folder: Path) -> None:
    """`data/sst2`, `my.jsonl`, and files that are each wrong in one way."""
    rows = _rows(48)
    _write(folder / "data/sst2/train.jsonl", rows)
    _write(folder / "data/sst2/validation.jsonl", _rows(20, seed=1))
    texts = [{"prompt": row["sentence"], "completion": " great" if row["label"] else " terrible"} for row in rows]
    _write(folder / "my.jsonl", texts)
    (folder / "empty.jsonl").write_text("")
    good = [json.dumps(row) for row in rows[:4]]
    (folder / "broken.jsonl").write_text("\n".join([*good[:2], '{"sentence": "the film', good[3]]) + "\n")
    _write(folder / "other-column.jsonl", [{"text": row["sentence"], "label": row["label"]} for row in rows])
    _write(folder / "odd-label.jsonl", [rows[0], {"sentence": "a film", "label": 7}, rows[1]])
    _write(folder / "long.jsonl", [rows[0], {"sentence": "really " * (CONTEXT + 1), "label": 1}])


def _rows(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        word = draw.choice(GOOD if number % 2 else BAD)
        rows.append({"sentence": f"the {draw.choice(['film', 'plot', 'cast'])} is {word}", "label": number % 2})
    return rows


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def word_tokenizer(start: list[str]) -> PreTrainedTokenizerFast:
    """A word is a token; ``start``: tokens that begin a text."""
    words = ["<unk>", "<pad>", "</s>", *start, *GOOD, *BAD, *OTHER]
    words += [f"Ġ{word}" for word in [*GOOD, *BAD, *OTHER]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    # A blank belongs to the word that follows it, as in byte-level tokenizers.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="never")
    first = start[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B:1", special_tokens=[(first, words.index(first))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
