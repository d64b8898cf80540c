"""Small models, data and runs that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import zotune
from zotune.optim.journal import Journal

LENGTH = 6
LOW, HIGH = 98, 99  # the answers' tokens: is the prompt's first token below 45?


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def choice_rows(count: int = 64, options: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        prompt = torch.randint(0, 90, (LENGTH,), generator=generator).tolist()
        rows.append({"prompt_ids": prompt, "option_ids": [[LOW], [HIGH], [97]][:options], "answer": int(prompt[0] >= 45)})
    return rows


def collate_choices(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([row["prompt_ids"] for row in rows]),
        "attention_mask": torch.ones(len(rows), LENGTH, dtype=torch.long),
        "positions": torch.full((len(rows), 1), LENGTH - 1),
        "option_ids": torch.tensor([[option[0] for option in row["option_ids"]] for row in rows]),
        "answer": torch.tensor([row["answer"] for row in rows]),
    }


def collate_completions(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate_choices(rows)
    options, answer = batch.pop("option_ids"), batch.pop("answer")
    return {**batch, "targets": options.gather(1, answer.unsqueeze(1))}


def labelled_rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows for a causal language model's own loss; a few labels are left out, unevenly."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number in range(count):
        ids = torch.randint(0, 100, (LENGTH,), generator=generator).tolist()
        labels = [-100] * (number % 4) + ids[number % 4 :]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def config(output_dir: Path, **options: Any) -> zotune.ZOConfig:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "eps": None,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return zotune.ZOConfig(output_dir=str(output_dir), **{**defaults, **options})


def trainer(output_dir: Path, model: Any = None, **options: Any) -> zotune.ZOTrainer:
    """A trainer on the choice problem; keywords of ZOTrainer are taken as such, all others go to the config."""
    given = {
        name: options.pop(name)
        for name in ("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "callbacks", "objective", "reward_funcs",
                     "eval_objective", "eval_data_collator", "optimizers", "processing_class", "compute_loss_func")
        if name in options
    }  # fmt: skip
    defaults = {"train_dataset": choice_rows(), "data_collator": collate_choices}
    return zotune.ZOTrainer(model=tiny_llama() if model is None else model, args=config(output_dir, **options), **{**defaults, **given})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def journal_of(output_dir: Path) -> Journal:
    return Journal.open(output_dir / "journal.zo")


def losses(trainer: zotune.ZOTrainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
