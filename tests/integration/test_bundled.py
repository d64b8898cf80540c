"""The model and the sentences that travel with the package are whole, clean and loadable."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from zotune import bundled

COUNTS = {"train": 500, "test": 216}


def rows(split: str) -> list[dict]:
    lines = (bundled.path("reviews") / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(sentence: str) -> tuple[str, ...]:
    """Words alone: two sentences that differ only in case or punctuation are the same."""
    return tuple(re.findall(r"[a-z0-9']+", sentence.lower()))


@pytest.mark.parametrize("split", COUNTS)
def test_each_split_has_its_number_of_rows_half_of_them_positive(split):
    labels = [row["label"] for row in rows(split)]
    assert len(labels) == COUNTS[split]
    assert all(type(label) is int and label in (0, 1) for label in labels)
    assert 2 * sum(labels) == len(labels)


@pytest.mark.parametrize("split", COUNTS)
def test_each_row_is_one_short_clean_english_sentence(split):
    for row in rows(split):
        assert set(row) == {"sentence", "label"}
        sentence = row["sentence"]
        assert sentence.isascii() and sentence.isprintable(), sentence
        assert sentence == " ".join(sentence.split()), sentence
        assert 6 <= len(sentence.split()) <= 30, sentence
        assert sentence[0].isupper() and sentence[-1] in ".?!", sentence


@pytest.mark.parametrize("split", COUNTS)
def test_rows_are_shuffled(split):
    labels = [row["label"] for row in rows(split)]
    changes = sum(a != b for a, b in itertools.pairwise(labels))
    assert changes > len(labels) // 3  # about half when shuffled, 1 when sorted by label


def test_no_sentence_occurs_twice_within_or_across_splits():
    sentences = [words(row["sentence"]) for split in COUNTS for row in rows(split)]
    assert len(set(sentences)) == len(sentences) == sum(COUNTS.values())


def test_no_two_sentences_share_most_of_their_words():
    bags = [frozenset(words(row["sentence"])) for split in COUNTS for row in rows(split)]
    alike = [(a, b) for i, a in enumerate(bags) for b in bags[:i] if len(a & b) >= 0.5 * len(a | b)]
    assert alike == []


def test_cards_state_the_counts_and_the_licence():
    card = (bundled.path("reviews") / "README.md").read_text(encoding="utf-8")
    for split, count in COUNTS.items():
        assert f"| `{split}.jsonl` | {count} | {count // 2} | {count // 2} |" in card
    for name in bundled.NAMES:
        assert "license: apache-2.0" in (bundled.path(name) / "README.md").read_text(encoding="utf-8")


def test_only_the_weights_are_large():
    files = [file for name in bundled.NAMES for file in bundled.path(name).rglob("*") if file.is_file()]
    large = [file.name for file in files if file.stat().st_size > 2**20]
    assert large == ["model.safetensors"]


def test_weights_on_disk_are_bfloat16():
    from safetensors import safe_open

    with safe_open(bundled.path("tiny-lm") / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (not a dict)
    assert dtypes == {"BF16"}


def test_model_and_tokenizer_load_and_score_a_sentence():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled.path("tiny-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert 6_800_000 < sum(p.numel() for p in model.parameters()) < 7_000_000
    assert tokenizer.pad_token == "<pad>"
    great, terrible = (tokenizer(w, add_special_tokens=False)["input_ids"] for w in (" great", " terrible"))
    assert len(great) == len(terrible) == 1

    def margin(sentence: str) -> float:
        ids = torch.tensor([tokenizer(f"{sentence} This movie is")["input_ids"]])
        assert ids[0, 0] == tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        return float(logits[great[0]] - logits[terrible[0]])

    # Trained weights, not random ones: praise is told from blame.
    assert margin("I loved this wonderful film.") > margin("I hated this awful film.") + 1.0


def test_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="tiny-lm, reviews"):
        bundled.path("huge-lm")
