"""Runs of other models than causal language models: trained, saved, loaded by the library of their users, evaluated again."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer, EvalPrediction

import zotune
from command_cases import BAD, GOOD, Result, run_command, save_encoder
from family_cases import answer, number, pair, save_images, save_llava, save_seq2seq, several, similarity, tagged, ticket, write_rows
from zotune.objectives import objective
from zotune.objectives.contrastive import ranking_loss
from zotune.tasks.images import ImageTextCollator
from zotune.tasks.token_labels import ComputeTagMetrics

SHORT = ("--use_cpu", "--max_steps", "2", "--learning_rate", "1e-2", "--train_file", "train.jsonl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(capsys: pytest.CaptureFixture[str], *words: str) -> Result:
    return run_command(capsys, "train", "--model_name_or_path", "model", *SHORT, "--eval_file", "eval.jsonl", "--output_dir", "run", *words)


def same_metrics(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The metrics after training, which `zotune eval` of the saved model gives again."""
    after = json.loads(Path("run/summary.json").read_text())["after"]
    result = run_command(capsys, "eval", "--model_name_or_path", "run", "--use_cpu", "--output_file", "found.json")
    assert result.code == 0, result.err
    found = json.loads(Path("found.json").read_text())["metrics"]
    names = [name for name in after if name not in ("runtime", "samples_per_second", "steps_per_second")]
    assert {name: found[name] for name in names} == pytest.approx({name: after[name] for name in names}, abs=1e-5)
    return found


def replays(capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether base model and journal give the saved weights."""
    assert run_command(capsys, "replay", "model", "run/journal.zo", "--output_dir", "again", "--use_cpu").code == 0
    one, other = load_file("run/model.safetensors"), load_file("again/model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- heads of texts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "words", "metrics", "outputs", "problem"),
    [
        (number, ["--method", "lozo"], {"pearson", "spearman", "mse"}, 1, "regression"),
        (several, ["--scheme", "lora"], {"micro_f1", "macro_f1"}, 2, "multi_label_classification"),
        (ticket, ["--problem_type", "single_label_classification"], {"accuracy", "f1"}, 4, "single_label_classification"),
    ],
)
def test_a_head_is_trained_saved_and_evaluated(here, capsys, draw, words, metrics, outputs, problem):
    save_encoder(here / "model", initializer_range=0.25)
    write_rows(here, draw)
    result = trained(capsys, *words)
    assert result.code == 0, result.err
    assert metrics <= same_metrics(capsys).keys()
    if "lora" in words:
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained("run", num_labels=outputs)
        assert model.config.num_labels == outputs
        return
    from transformers import AutoModelForSequenceClassification

    config = AutoModelForSequenceClassification.from_pretrained("run").config
    assert (config.num_labels, config.problem_type) == (outputs, problem)
    assert replays(capsys)


@pytest.mark.parametrize(
    ("texts", "problem", "labels"),
    [
        (["0.5", "1", "-2e-1"], "regression", [0.5, 1.0, -0.2]),
        (["3", "1", "3"], "single_label_classification", [1, 0, 1]),
        (['["good", "bad"]', "[]", '["bad"]'], "multi_label_classification", [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
        (["1.5", "good", "bad"], "single_label_classification", [0, 2, 1]),
    ],
)
def test_labels_of_a_table_of_texts_are_read(here, texts, problem, labels):
    save_encoder(here / "model")
    with open("train.csv", "w") as file:
        csv.writer(file).writerows([("text", "label"), *(("the film", text) for text in texts)])
    data = zotune.tasks.prepare(AutoTokenizer.from_pretrained("model"), AutoConfig.from_pretrained("model"), train_file="train.csv")
    assert (data.kind.problem, [row["label"] for row in data.train]) == (problem, labels)


@pytest.mark.parametrize(
    ("rows", "words", "reason"),
    [
        (
            [{"text": "the film", "label": 0.5}, {"text": "the film", "label": "good"}],
            [],
            "holds labels that are no classes: each is a name or a whole number",
        ),
        ([{"text": "the film", "labels": ["good", 3]}] * 2, [], "is none of the classes"),
        ([{"text": "the film", "label": "good"}] * 2, [], "has one label only, 'good'"),
        (
            [{"text": "a", "label": "good"}, {"text": "a", "label": "bad"}],
            ["--problem_type", "regression"],
            "a number, or a list of numbers",
        ),
        ([{"text": "the film"}] * 2, ["--objective", "classifier"], "has no labels for a classification head"),
    ],
)
def test_labels_that_fit_no_head_are_refused(here, capsys, rows, words, reason):
    save_encoder(here / "model")
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("eval.jsonl").write_text(Path("train.jsonl").read_text())
    result = trained(capsys, *words)
    assert result.code == 2 and reason in result.err and not Path("run").exists()


# -- encoder-decoders, token classifiers, sentence embeddings ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_loss_of_targets_is_the_models_own_whatever_is_beside(here, name):
    save_seq2seq(here / "model", name)
    write_rows(here, answer, 6, 4)
    model = AutoModelForSeq2SeqLM.from_pretrained("model").eval()
    data = zotune.tasks.prepare(AutoTokenizer.from_pretrained("model"), model.config, train_file="train.jsonl")
    data.train[1]["target_ids"], data.train[2]["input_ids"] = [5, 6, 7, 2], data.train[2]["input_ids"] * 2
    loss = objective("seq2seq", model)
    with torch.no_grad():
        together = loss(data.collate_train(data.train))
        rows = [(torch.tensor([row["input_ids"]]), torch.tensor([row["target_ids"]])) for row in data.train]
        own = torch.stack([model(input_ids=ids, labels=labels).loss for ids, labels in rows])
    assert torch.allclose(together, own, atol=1e-6)


def test_ranking_is_the_cross_entropy_of_scaled_cosines():
    embeddings = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    candidates = torch.cat([embeddings[:, 1], embeddings[:, 2]])
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, 0].unsqueeze(1), candidates.unsqueeze(0), dim=2)
    assert torch.allclose(ranking_loss(embeddings), torch.nn.functional.cross_entropy(20 * cosines, torch.arange(4)))


@pytest.mark.parametrize(
    ("draw", "save", "metrics", "loader", "words"),
    [
        (answer, partial(save_seq2seq, name="bart"), {"token_f1", "exact_match"}, "Seq2SeqLM", []),
        (answer, partial(save_seq2seq, name="bart"), {"token_f1", "exact_match"}, "Seq2SeqLM", ["--scheme", "lora"]),
        (tagged, save_encoder, {"f1", "accuracy"}, "TokenClassification", ["--scheme", "lora"]),
        (pair, save_encoder, {"accuracy", "mrr"}, None, []),
        (similarity, save_encoder, {"spearman", "pearson"}, None, ["--scheme", "lora"]),
    ],
)
def test_a_family_is_trained_saved_and_evaluated(here, capsys, draw, save, metrics, loader, words):
    save(here / "model")
    write_rows(here, draw)
    result = trained(capsys, "--method", "mezo", *words)
    assert result.code == 0, result.err
    assert metrics <= same_metrics(capsys).keys()
    if words:
        kind = getattr(peft, f"AutoPeftModelFor{loader or 'FeatureExtraction'}")
        kind.from_pretrained("run", **({"num_labels": 5} if loader == "TokenClassification" else {}))
        return
    getattr(transformers, f"AutoModelFor{loader}" if loader else "AutoModel").from_pretrained("run")
    assert replays(capsys)
    assert loader is not None or json.loads(Path("again/1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"] is True


def test_a_model_of_images_learns_captions_and_is_saved_with_its_processor(here, capsys):
    save_llava(here / "model")
    save_images(here)
    words = [
        "--train_file",
        "train/metadata.jsonl",
        "--eval_file",
        "eval/metadata.jsonl",
        "--method",
        "mezo",
        "--forward_batching",
        "sequential",
    ]
    result = trained(capsys, *words)
    assert result.code == 0, result.err
    assert {"token_f1", "exact_match"} <= same_metrics(capsys).keys()
    assert replays(capsys)
    for folder in ("run", "again"):
        model, processor = transformers.AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        row = processor(images=[Image.open("eval/0.png")], text=["<image>"], return_tensors="pt")
        assert model(**row).logits.shape[1] == row["input_ids"].shape[1]
    collate = ImageTextCollator(1, processor=processor)
    ids = row["input_ids"][0].tolist()
    rows = [{"prompt_ids": ids, "completion_ids": [4, 5], "image": f"eval/{number}.png", "text": "<image>"} for number in (0, 1)]
    loss = objective("image-text", model.eval())
    with torch.no_grad():
        assert torch.allclose(loss(collate(rows)), torch.cat([loss(collate([one])) for one in rows]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"), [("../model/config.json", "is outside of the folder"), ("no.png", "there is no image"), ("x.png", "is no image")]
)
def test_a_file_that_is_no_image_of_the_folder_is_refused(here, capsys, name, reason):
    save_llava(here / "model")
    save_images(here, 2, 2)
    Path("train/x.png").write_text("no image")
    Path("train/metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a film"}) + "\n")
    result = trained(capsys, "--train_file", "train/metadata.jsonl", "--eval_file", "eval/metadata.jsonl")
    assert result.code == 2 and "line 1: " in result.err and reason in result.err


def test_a_pooler_that_no_embedding_reads_stays_as_it_is(here, capsys):
    save_encoder(here / "model")
    write_rows(here, pair)
    assert trained(capsys, "--method", "mezo").code == 0
    one, other = load_file("model/model.safetensors"), load_file("run/model.safetensors")
    assert {name for name in one if not torch.equal(one[name], other[name])} == {name for name in one if not name.startswith("pooler.")}


@pytest.mark.parametrize(
    ("draw", "save", "words", "reason"),
    [
        (
            pair,
            save_encoder,
            ["--method", "mezo", "--dp_noise_multiplier", "1", "--dp_clip", "1", "--eps", "1e-3"],
            "so that it cannot be clipped",
        ),
        (tagged, save_encoder, ["--method", "mezo", "--dp_noise_multiplier", "1", "--dp_clip", "1", "--eps", "1e-3"], "must not publish"),
        (pair, save_encoder, ["--method", "mezo", "--attribute", "eval.jsonl"], "no example has a share of its own"),
        (pair, save_encoder, ["--method", "lozo-e", "--directions_per", "example"], "needs one loss per example"),
        (pair, save_encoder, ["--per_device_train_batch_size", "1"], "must be 2 or more"),
        (answer, partial(save_seq2seq, name="t5"), ["--scheme", "prefix"], "is for causal language models, and this is a T5"),
        (tagged, partial(save_seq2seq, name="t5"), [], "is trained on rows with prompt and completion"),
        (answer, partial(save_seq2seq, name="t5"), ["--loss_over", "tokens"], "loss_over='tokens' is"),
        (pair, save_encoder, ["--bos_token", "the"], "bos_token would have no effect"),
        (answer, partial(save_seq2seq, name="t5"), ["--problem_type", "regression"], "leave it out"),
    ],
)
def test_what_makes_no_sense_for_a_family_is_refused(here, capsys, draw, save, words, reason):
    save(here / "model")
    write_rows(here, draw, 8, 8)
    result = trained(capsys, *words)
    assert result.code == 2 and reason in result.err, result.err


def test_entities_are_counted_whole():
    metrics = ComputeTagMetrics(("B-X", "I-X", "O"))
    right = np.array([[0, 1, 2, 0], [2, 0, -100, -100]])
    found = np.array([[0, 1, 2, 2], [0, 0, 2, 2]])  # of (0–2), (3–4) and (1–2), found (0–2), (1–2) and one too many
    assert metrics(EvalPrediction(found, right)) == pytest.approx({"f1": 2 / 3, "accuracy": 4 / 6})


def test_a_real_encoders_sentence_files_go_along(sentence_encoder, here, capsys):
    rows = [{"anchor": f"a {word} day", "positive": f"the day was {word}"} for word in (*GOOD, *BAD)]
    for name in ("train", "eval"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(sentence_encoder), *SHORT, "--eval_file", "eval.jsonl", "--output_dir", "run", "--method", "mezo"]
    assert run_command(capsys, "train", *words, "--learning_rate", "1e-6", "--max_steps", "1", "--eval_strategy", "no").code == 0
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert json.loads(Path("run", name).read_text()) == json.loads((sentence_encoder / name).read_text())
    assert json.loads(Path("run/summary.json").read_text())["before"]["accuracy"] > 0.8


def test_the_memory_of_an_encoder_decoder_is_a_fixed_share(here, capsys):
    save_seq2seq(here / "model", "t5")
    write_rows(here, answer)
    words = ["--method", "lozo", "--offload", "disk", "--max_memory", "12GiB", "--offload_blocks", "encoder.block"]
    words += ["--forward_batching", "sequential"]
    assert trained(capsys, *words).code == 0
    refused = run_command(capsys, "estimate", "--model_name_or_path", "model", "--method", "lozo")
    assert refused.code == 2 and "the memory of a t5 model is not predicted" in refused.err and refused.err.count("\n") == 1
