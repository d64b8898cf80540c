"""Toy rows and small random models of the families beside causal language models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_cases import BAD, GOOD

Draw = Callable[[random.Random], dict[str, Any]]


def number(draw: random.Random) -> dict[str, Any]:
    """A text whose label is the share of good words."""
    good = draw.randint(0, 4)
    words = [*draw.choices(GOOD, k=good), *draw.choices(BAD, k=4 - good)]
    draw.shuffle(words)
    return {"text": " ".join(words), "label": good / 2 - 1.0}


def several(draw: random.Random) -> dict[str, Any]:
    """A text with a label for each kind of word in it."""
    chosen = [name for name in ("good", "bad") if draw.random() < 0.5]
    words = ["the film", *(draw.choice(GOOD if name == "good" else BAD) for name in chosen)]
    return {"text": " ".join(words), "labels": chosen}


def ticket(draw: random.Random) -> dict[str, Any]:
    """A text of one of four classes."""
    word = draw.choice(["fine", "dull", "sharp", "weak"])
    return {"text": f"the film is {word}", "label": f"about {word}"}


def write_rows(folder: Path, draw: Draw, train: int = 32, evaluated: int = 16) -> None:
    """`train.jsonl` and `eval.jsonl`."""
    for name, count, seed in (("train", train, 0), ("eval", evaluated, 1)):
        rows = [draw(source) for source in [random.Random(seed)] for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
