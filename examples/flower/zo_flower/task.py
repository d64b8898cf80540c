"""What server and clients share: model, optimizer, and a client's share of the reviews."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune
from zotune.optim import federated
from zotune.weights import digest

Config = Mapping[str, Any]


def optimizer_of(model: nn.Module, config: Config, journal: Path | None = None) -> zotune.ZerothOrder:
    """The same for server and clients: method, seed and ε determine the directions."""
    method = zotune.methods.get(str(config["method"]), eps=float(config["eps"]))
    optimizer = zotune.ZerothOrder(model, method, lr=float(config["learning-rate"]), seed=int(config["seed"]), journal=journal)
    federated.check(optimizer)
    return optimizer


def model_of(config: Config) -> tuple[nn.Module, Any]:
    """The base model, which everybody has, and its tokenizer."""
    name = str(config["model"]) or str(zotune.bundled.path("tiny-lm"))
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


class Client:
    """A client's model, optimizer and data, and the records of the steps that it has taken."""

    def __init__(self, config: Config, partition: int, partitions: int) -> None:
        self.model, tokenizer = model_of(config)
        self.optimizer, self.records = optimizer_of(self.model, config), b""
        self.batch_size = int(config["batch-size"])
        with (zotune.bundled.path("reviews") / "train.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][partition::partitions]
        answers = (" terrible", " great")
        texts = [{"prompt": f"{row['sentence']} It was", "completion": answers[row["label"]]} for row in rows]
        encoder = zotune.tasks.Encoder(tokenizer)
        self.examples = encoder.completions(zotune.tasks.Rows(texts, "reviews", range(len(texts)), "row"))
        self.collate = zotune.tasks.LanguageModelCollator(zotune.tasks.pad_token_id(tokenizer))
        self.loss = zotune.objectives.LanguageModelLoss(self.model)

    def propose(self) -> tuple[bytes, int]:
        """The record of the next step by the client's own losses, and its number of examples."""
        generator = torch.Generator().manual_seed(self.optimizer.steps)
        chosen = torch.randperm(len(self.examples), generator=generator)[: self.batch_size].tolist()
        batch = self.collate([self.examples[index] for index in chosen])
        return federated.packed([federated.propose(self.optimizer, self.loss, batch)]), len(chosen)

    def follow(self, first: int, records: bytes) -> bool:
        """Takes the steps that others have taken too, from step ``first``; False: earlier ones are missing."""
        known = federated.unpacked(records, len(self.optimizer.param_groups))
        if first > self.optimizer.steps:
            return False
        new = known[self.optimizer.steps - first :]
        federated.take(self.optimizer, new)
        self.records += federated.packed(new)
        return True


def digest_of(model: nn.Module) -> str:
    """Of the trained weights, bit for bit; low-rank updates that are not yet in the weights are part of them."""
    return digest.digest_of(dict(model.state_dict()))
