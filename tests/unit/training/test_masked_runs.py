"""Runs of masked language models on label words: evaluation of what was trained, replay, resume, and schemes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from command_cases import run_command, save_data, save_masked
from zotune import methods
from zotune.memory import Workload, estimate

WORDS = ("--task", "sst2", "--data_dir", "data", "--objective", "mlm", "--use_cpu", "--max_steps", "4", "--learning_rate", "1e-2")
TRAIN = ("train", "--model_name_or_path", "my-masked", *WORDS, "--method", "lozo", "--output_dir", "run", "--save_steps", "2")


@pytest.fixture
def here(tmp_path, monkeypatch):
    save_masked(tmp_path / "my-masked")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path):
    found = json.loads(path.read_text())
    return {name: found["metrics"][name] for name in ("loss", "accuracy")}


def test_a_run_is_evaluated_replayed_and_resumed_with_its_masked_head(here, capsys):
    assert run_command(capsys, *TRAIN).code == 0
    trained, summary = load_file("run/model.safetensors"), json.loads((here / "run/summary.json").read_text())
    assert run_command(capsys, "eval", "--model_name_or_path", "run", "--use_cpu", "--output_file", "found.json").code == 0
    assert metrics(here / "found.json") == pytest.approx({name: summary["after"][name] for name in ("loss", "accuracy")}, abs=1e-6)
    assert run_command(capsys, "replay", "my-masked", "run/journal.zo", "--output_dir", "again", "--use_cpu").code == 0
    again = load_file("again/model.safetensors")
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    assert not torch.equal(trained["lm_head.dense.weight"], load_file("my-masked/model.safetensors")["lm_head.dense.weight"])
    more = [*TRAIN, "--resume_from_checkpoint", "run/checkpoint-2"]
    assert run_command(capsys, *more).code == 0
    assert all(torch.equal(trained[name], weight) for name, weight in load_file("run/model.safetensors").items())


@pytest.mark.parametrize("scheme", ["lora", "head", "bias", "prompt", "prefix"])
def test_what_a_scheme_trained_is_saved_and_loaded(here, capsys, scheme):
    result = run_command(capsys, *TRAIN, "--scheme", scheme, "--method", "mezo")
    if scheme in ("prompt", "prefix"):
        assert result.code == 2 and "is for causal language models, and this is a RobertaForMaskedLM" in result.err
        return
    assert result.code == 0, result.err
    after = json.loads((here / "run/summary.json").read_text())["after"]
    assert run_command(capsys, "eval", "--model_name_or_path", "run", "--use_cpu", "--output_file", "found.json").code == 0
    assert metrics(here / "found.json") == pytest.approx({name: after[name] for name in ("loss", "accuracy")}, abs=1e-6)


def test_the_head_scheme_trains_transform_decoder_and_biases(here):
    from zotune.training import schemes

    model = AutoModelForMaskedLM.from_pretrained("my-masked")
    before = model.roberta.embeddings.word_embeddings.weight
    schemes.apply(model, "head")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"lm_head.{layer}.{name}" for layer in ("dense", "layer_norm", "decoder") for name in ("weight", "bias")}
    assert model.lm_head.decoder.weight is not before


def test_a_checkpoint_without_a_masked_head_is_refused(here, capsys):
    model = BertForMaskedLM.config_class(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    from transformers import AutoTokenizer, BertModel

    BertModel(model).save_pretrained("bare")
    AutoTokenizer.from_pretrained("my-masked").save_pretrained("bare")
    words = [word if word != "my-masked" else "bare" for word in TRAIN]
    result = run_command(capsys, *words)
    assert result.code == 2 and "bare has no complete head of a masked language model" in result.err


def test_demonstrations_are_evaluated_before_prompts(here, capsys):
    words = ("train", "--model_name_or_path", "my-masked", *WORDS[:7], "--output_dir", "icl")
    result = run_command(capsys, *words, "--method", "icl", "--num_demonstrations", "2")
    assert result.code == 0 and "with demonstrations: accuracy" in result.out + result.err


def test_memory_is_estimated_with_the_masked_head(here, capsys):
    model = AutoModelForMaskedLM.from_pretrained("my-masked")
    found = estimate(Workload(model.config, methods.mezo(), batch_size=2, sequence_length=8, masked=True), accelerator=False)
    assert found.kinds["weights"] == sum(each.numel() * each.itemsize for each in (*model.parameters(), *model.buffers()))
    refused = run_command(capsys, "estimate", "--model_name_or_path", "opt-125m", "--objective", "mlm")
    assert refused.code == 2 and "--objective mlm needs an encoder, and opt-125m is none" in refused.err
