"""Lightning Fabric with forward passes only: language modeling of short reviews, on one or several devices.

    python examples/fabric.py --output_dir runs/fabric [--devices 2] [--model Qwen/Qwen2.5-0.5B] [--max_steps 100]

Fabric places model and batches, starts the processes, sets the precision and saves; zotune takes the steps. Needs `zotune[fabric]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune


def loader_of(tokenizer: Any, texts: list[str], batch_size: int) -> DataLoader:
    """Batches of texts as tokens with labels."""

    def collate(rows: list[str]) -> dict[str, Tensor]:
        batch = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=128)
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    return DataLoader(texts, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def train(fabric: Fabric, module: nn.Module, loader: DataLoader, max_steps: int, **options: Any) -> zotune.ZerothOrder:
    """Trains a causal language model, and returns its optimizer; ``options``: of :class:`zotune.ZerothOrder`."""
    fabric.to_device(module)  # before the optimizer, which draws on the device of the weights
    model, optimizer = fabric.setup(module, zotune.ZerothOrder(module, **options))
    loader = fabric.setup_dataloaders(loader)

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return losses.sum(dim=1) / (labels != -100).sum(dim=1)  # one number per example

    for step, batch in enumerate(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), max_steps), start=1):
        loss = optimizer.optimizer.step(loss_fn, batch)  # Fabric's own step takes a closure alone
        if step % 10 == 0:
            fabric.print(f"step {step}: loss {loss:.3f}, {optimizer.forward_passes} forward passes")
    return optimizer.optimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(zotune.bundled.path("tiny-lm")))
    parser.add_argument(
        "--train_file", type=Path, default=zotune.bundled.path("reviews") / "train.jsonl", help="JSON Lines with `sentence`"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fabric"))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=100)
    args = parser.parse_args()
    # The losses are all that the processes exchange: no gradient, and no buffer before a forward pass either.
    fabric = Fabric(devices=args.devices, strategy=DDPStrategy(broadcast_buffers=False) if args.devices > 1 else "auto")
    fabric.launch()
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    with args.train_file.open(encoding="utf-8") as file:
        texts = [json.loads(line)["sentence"] for line in file]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    journal = args.output_dir / "journal.zo"
    optimizer = train(fabric, model, loader_of(tokenizer, texts, 8), args.max_steps, method="lozo", lr=1e-3, seed=0, journal=journal)
    optimizer.remove_hooks()
    if fabric.global_rank == 0:
        model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
