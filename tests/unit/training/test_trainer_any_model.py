"""ZOTrainer trains mixtures of experts and state-space models by the default method, whole and by adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zotune
from any_modules import LANGUAGE_MODELS, build
from trainer_cases import same_weights, trainer, weights
from zotune.objectives import LanguageModelLoss

peft = pytest.importorskip("peft")

#: Layers that PEFT adapts, by model; experts are no layers.
TARGETS = {"mamba": ["in_proj", "x_proj"], "deepseek-v3": ["kv_b_proj", "o_proj"]}


def rows(count: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 40, (count, 6), generator=generator)
    return [{"prompt_ids": row.tolist(), "target": 5} for row in ids]


def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["prompt_ids"] for row in some])
    targets = torch.tensor([[row["target"]] for row in some])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": torch.full((len(some), 1), 5), "targets": targets}


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(LanguageModelLoss(model)(collate(rows())).mean())


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_default_method_learns_and_replays(name: str, adapter: bool, tmp_path: Path) -> None:
    def model() -> Any:
        if not adapter:
            return build(name)
        config = peft.LoraConfig(r=4, target_modules=TARGETS.get(name, ["q_proj", "v_proj", "o_proj"]), task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(build(name), config)

    run = trainer(tmp_path, model(), train_dataset=rows(), data_collator=collate, method="lozo-g",
                  max_steps=8, learning_rate="auto", eps=1e-2, per_device_train_batch_size=4)  # fmt: skip
    before = loss_of(run.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run.train()
    assert loss_of(run.model) < before - 0.001
    replayed = model()
    zotune.replay(replayed, tmp_path / "journal.zo").remove_hooks()
    assert same_weights(weights(run.model), weights(replayed))
