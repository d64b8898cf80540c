"""A run in other forms: what `peft` and transformers load is the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from command_cases import run_command
from zotune.publishing.adapter import adapter_of

peft = pytest.importorskip("peft")

WORDS = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--learning_rate", "1e-2", "--max_steps", "3"]
WORDS += ["--per_device_train_batch_size", "4", "--num_train", "8", "--num_dev", "0", "--num_eval", "4", "--eps", "1e-3"]
TOKENS = torch.arange(12).reshape(2, 6)


def trained(capsys: pytest.CaptureFixture[str], method: str, *words: str) -> Path:
    done = run_command(capsys, "train", *WORDS, "--method", method, *words, "--output_dir", "run")
    assert done.code == 0, done.err
    return Path("run")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def of(folder: str | Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_a_low_rank_run_is_an_adapter(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, "lozo", "--rank", "2")
    done = run_command(capsys, "export", str(run), "--to", "peft", "--output_dir", "adapter")
    assert done.code == 0, done.err
    assert "an adapter of rank 2 " in done.out  # V is kept over the three steps
    change = (of(run) - of("my-model")).norm()
    assert change > 1e-3
    assert (logits(peft.AutoPeftModelForCausalLM.from_pretrained("adapter")) - of(run)).norm() < 1e-4 * change
    assert run_command(capsys, "export", str(run), "--to", "merged", "--output_dir", "whole").code == 0
    assert torch.equal(of("whole"), of(run))


def test_what_a_rank_loses_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, "mezo")
    done = run_command(capsys, "export", str(run), "--to", "peft", "--rank", "3", "--output_dir", "adapter")
    assert done.code == 0, done.err
    assert "a higher --rank keeps more" in done.out
    models = [dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in ("my-model", run)]
    squares = torch.zeros(2, dtype=torch.float64)
    for name, value in models[1].items():
        if value.ndim == 2:
            spectrum = torch.linalg.svdvals((value - models[0][name]).detach().double()).square()
            squares += torch.stack([spectrum[3:].sum(), spectrum.sum()])
    assert f"it lacks {float((squares[0] / squares[1]).sqrt()):.2g} " in done.out
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 3, str(Path("my-model").resolve()))


def test_an_adapter_of_a_run_is_exported_as_it_is(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, "lozo", "--scheme", "lora")
    assert run_command(capsys, "export", str(run), "--to", "peft", "--output_dir", "adapter").code == 0
    assert Path("adapter/adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    assert run_command(capsys, "export", str(run), "--to", "merged", "--output_dir", "whole").code == 0
    assert not Path("whole/adapter_config.json").exists()
    torch.testing.assert_close(of("whole"), logits(peft.AutoPeftModelForCausalLM.from_pretrained(run)), atol=1e-6, rtol=1e-5)
    for words, said in (
        (["--to", "peft", "--rank", "2"], "leave --rank out"),
        (["--to", "merged", "--rank", "2"], "--rank is of --to peft"),
        (["--to", "peft", "--outtype", "f16"], "--outtype is of --to gguf"),
        (["--to", "peft"], "is not empty"),
    ):
        place = "adapter" if "empty" in said else "elsewhere"
        refused = run_command(capsys, "export", str(run), *words, "--output_dir", place)
        assert (refused.code, said in refused.err) == (2, True), refused.err
    (run / "summary.json").unlink()
    assert "has not ended" in run_command(capsys, "export", str(run), "--to", "merged", "--output_dir", "x").err


def test_the_base_may_have_moved(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, "lozo", "--rank", "2")
    Path("my-model").rename("moved")
    lost = run_command(capsys, "export", str(run), "--to", "peft", "--output_dir", "adapter")
    assert (lost.code, "my-model" in lost.err) == (2, True)
    assert not Path("adapter").exists()
    assert run_command(capsys, "export", str(run), "--to", "peft", "--base", "moved", "--output_dir", "adapter").code == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "moved"


def test_a_run_becomes_a_gguf_file(tiny_lm: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    words = ["--model_name_or_path", str(tiny_lm), "--train_file", "my.jsonl", "--max_steps", "1", "--method", "mezo", "--eps", "1e-3"]
    assert run_command(capsys, "train", *words, "--learning_rate", "1e-4", "--output_dir", "run").code == 0
    assert run_command(capsys, "export", "run", "--to", "gguf", "--outtype", "q8_0", "--output_dir", "run.gguf").code == 0
    assert run_command(capsys, "convert", "run", "same.gguf", "--outtype", "q8_0").code == 0
    assert Path("run.gguf").read_bytes()[-4096:] == Path("same.gguf").read_bytes()[-4096:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_biases_norms_and_tied_embeddings_go_along(kind: str, tied: bool) -> None:
    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "gpt2":
                return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied))
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, tie_word_embeddings=tied, **sizes))

    after, generator = fresh(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            if parameter.ndim == 2:
                u, v = (torch.randn(size, 2, generator=generator) for size in parameter.shape)
                parameter += 0.05 * u @ v.T
            else:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    change = (logits(after) - logits(fresh())).norm()
    found = adapter_of(fresh(), after)
    assert found.error < 1e-5
    assert (logits(found.model) - logits(after)).norm() < 1e-4 * change
    assert found.rank == 2
    assert found.whole and found.biases == (kind == "gpt2")


def test_equal_models_have_no_adapter() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="nothing to export"):
        adapter_of(model, model)


def test_an_adapter_with_biases_is_read_again_as_it_was(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
            return OPTForCausalLM(OPTConfig(vocab_size=40, max_position_embeddings=16, **sizes))

    after, generator = fresh(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if name.endswith(("proj.weight", "proj.bias")):  # every linear layer of the blocks' attention, with its bias
                u, v = (torch.randn(size, 1, generator=generator) for size in parameter.view(len(parameter), -1).shape)
                parameter += 0.05 * (u @ v.T).view_as(parameter)
    found = adapter_of(fresh(), after)
    assert (found.whole, found.biases, found.rank) == ([], True, 1)
    found.model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    change = (logits(after) - logits(fresh())).norm()
    assert (logits(read) - logits(after)).norm() < 1e-4 * change


def test_where_vectors_alone_were_trained_there_is_nothing_to_factor() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    base, after = LlamaForCausalLM(LlamaConfig(**sizes)), LlamaForCausalLM(LlamaConfig(**sizes))
    after.load_state_dict(base.state_dict())
    with torch.no_grad():
        after.model.norm.weight += 1
    with pytest.raises(ValueError, match="export with --to merged"):
        adapter_of(base, after)
