"""Three tasks that a 7M model of film reviews learns from rewards: prompts, held-out prompts, a reward by TRL's contract.

- sentiment: continue the first words of a review; the reward is the probability that a linear probe gives the continuation of being
  positive. Maximized without a view to the prompt: praise that fits anything. Seen as few distinct continuations.
- word: continue the first words of a review; the reward is 1 if the continuation contains a word, else 0.
  Maximized without sense: the word at once, after every prompt. Seen as a low probability under the model before training.
- accuracy: SST-2; after a sentence and " The acting is", the reward is 1 if the next word is of the right side, else 0.
  Cannot be maximized without the sentence: sentences of both labels are as many.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, Any]
Reward = Callable[..., list[float]]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


WORD = "story"
POSITIVE = words("good great well funny excellent wonderful entertaining enjoyable interesting beautiful best")
NEGATIVE = words("bad boring poor poorly terrible awful slow stupid dull disappointing worst weak")
QUESTION = " The acting is"
POOL = {"train": 512, "held_out": 256}


@dataclass(frozen=True)
class Task:
    """Prompts and a reward.

    Args:
        train, held_out: rows with a "prompt" and the columns that `reward` takes.
        reward: `(prompts, completions, **columns) -> list of floats`.
        max_new_tokens: length of a completion.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    reward: Reward
    max_new_tokens: int


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def beginnings(rows: list[Row], count: int) -> list[Row]:
    """The first five words of `count` sentences of ten words or more."""
    rows = [row for row in rows if len(row["text"].split()) >= 10]
    return [{"prompt": " ".join(row["text"].split()[:5])} for row in random.Random(0).sample(rows, count)]


def sentences(rows: list[Row], count: int) -> list[Row]:
    """Sentences of 4 to 20 words, as many of either label."""
    kept: list[Row] = []
    for label in (0, 1):
        of_label = [row for row in rows if row["label"] == label and 4 <= len(row["sentence"].split()) <= 20]
        kept += random.Random(label).sample(of_label, count // 2)
    random.Random(0).shuffle(kept)
    return [{"prompt": row["sentence"].strip() + QUESTION, "label": row["label"]} for row in kept]


def contains_word(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 if the completion contains the word, else 0."""
    return [float(WORD in words(completion)) for completion in completions]


def right_side(prompts: list[str], completions: list[str], label: list[int], **columns: Any) -> list[float]:
    """1 if the completion has a word of the label's side and none of the other, else 0."""
    found = [(bool(words(text) & POSITIVE), bool(words(text) & NEGATIVE)) for text in completions]
    return [float(side == ((True, False) if row == 1 else (False, True))) for side, row in zip(found, label, strict=True)]


class Probe:
    """A linear probe on the mean state of a text after the model's first block, fitted to SST-2 sentences.

    Args:
        model: folder of the model. data_dir: folder with `sst2/train.jsonl`. cache: file the fitted probe is kept in.
    """

    def __init__(self, model: str, data_dir: Path, cache: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.block = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=1).model.eval()
        if not cache.exists():
            torch.save(self._fit(read(data_dir / "sst2" / "train.jsonl")[:3000]), cache)
        self.mean, self.spread, self.weight, self.bias = torch.load(cache)

    def states(self, texts: list[str]) -> Tensor:
        """Mean states (N, width)."""
        parts = []
        for start in range(0, len(texts), 128):
            chunk = [text.strip() or "." for text in texts[start : start + 128]]
            batch = self.tokenizer(chunk, return_tensors="pt", padding=True, return_token_type_ids=False)
            with torch.inference_mode():
                states = self.block(**batch, use_cache=False).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    def _fit(self, rows: list[Row]) -> tuple[Tensor, ...]:
        x, y = self.states([row["sentence"] for row in rows]).clone(), torch.tensor([float(row["label"]) for row in rows])
        mean, spread = x.mean(0), x.std(0) + 1e-6
        x = (x - mean) / spread
        weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum") + 10 * (weight**2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return mean, spread, weight.detach(), bias.detach()

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Probability of each completion of being positive."""
        return torch.sigmoid((self.states(completions) - self.mean) / self.spread @ self.weight + self.bias).tolist()


def load(name: str, model: str, data_dir: Path, cache: Path) -> Task:
    """A task by its name.

    Args:
        name: sentiment, word or accuracy. model: folder of the model. data_dir: folder of the data sets. cache: folder of the fitted probe.
    """
    if name == "accuracy":
        train, held_out = (read(data_dir / "sst2" / f"{split}.jsonl") for split in ("train", "validation"))
        return Task(name, sentences(train, POOL["train"]), sentences(held_out, POOL["held_out"]), right_side, 1)
    train, held_out = (
        beginnings(read(data_dir / "mr" / f"{s}.jsonl"), POOL[k]) for s, k in (("train", "train"), ("validation", "held_out"))
    )
    reward: Reward = contains_word if name == "word" else Probe(model, data_dir, cache / "probe.pt")
    if isinstance(reward, Probe):
        reward.__name__ = "positive"  # TRL names a reward by it
    return Task(name, train, held_out, reward, 8)


def rows_of_step(task: Task, seed: int, step: int, count: int) -> list[Row]:
    """The training rows of a step: a new order each epoch."""
    per_epoch = len(task.train) // count
    order = random.Random(1_000_003 * seed + step // per_epoch).sample(range(len(task.train)), len(task.train))
    start = step % per_epoch * count
    return [task.train[i] for i in order[start : start + count]]


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Columns of rows, the prompt left out."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
