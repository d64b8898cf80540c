"""Adapters: only they move, only they are saved, and a run over them resumes and replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zotune
from trainer_cases import StopAt, choice_rows, same_weights, tiny_llama, trainer, weights

peft = pytest.importorskip("peft")

# PEFT's LoRA layer asks its A matrix for its dtype, which a low-rank method over the adapter takes for a use of it.


def with_lora(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return weights(peft.PeftModel.from_pretrained(tiny_llama(), folder))


@pytest.mark.parametrize("method", ["mezo", "lozo"])
def test_only_the_adapter_moves_and_is_saved(method: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, with_lora(), method=method, save_strategy="steps", save_steps=6, learning_rate=1e-1)
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(before[name], after[name]) != ("lora_" in name), name
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and "model.safetensors" not in files
    assert same_weights(adapter(tmp_path / "checkpoint-6"), after)


@pytest.mark.parametrize("method", ["mezo-adam", "lozo-m"])
def test_an_adapter_run_resumes_bit_for_bit_and_replays(method: str, tmp_path: Path) -> None:
    options = {"interval": 4} if method == "lozo-m" else {}
    run = {"max_steps": 12, "lr_scheduler_type": "linear", "train_dataset": choice_rows(40), "method": method} | options
    saving = {**run, "save_strategy": "steps", "save_steps": 5}
    straight = trainer(tmp_path / "straight", with_lora(), **run)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", with_lora(), callbacks=[StopAt(7)], **saving).train()
    resumed = trainer(tmp_path / "resumed", with_lora(seed=5), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model))
    assert (tmp_path / "straight/journal.zo").read_bytes() == (tmp_path / "resumed/journal.zo").read_bytes()

    base = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "resumed/initial_adapter", is_trainable=True)
    zotune.replay(base, tmp_path / "resumed/journal.zo").remove_hooks()
    assert same_weights(weights(base), weights(resumed.model))


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    every_two = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, with_lora(), method="mezo", learning_rate=1.0, seed=1, max_steps=8, eval_dataset=choice_rows(),
                  load_best_model_at_end=True, **every_two)  # fmt: skip
    run.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best < 8, "this seed's best adapter is its last, which makes for no test"
    assert same_weights(adapter(tmp_path / f"checkpoint-{best}"), weights(run.model))
