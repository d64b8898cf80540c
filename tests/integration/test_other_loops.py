"""The loops of other libraries (docs/how-to/other_loops.md) take the steps of a plain one; the scripts are those of examples/."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import command_cases
import examples
import trainer_cases
import zotune

TEXTS = [f"the {noun} is {word}" for noun, word in itertools.product(("film", "plot", "cast"), command_cases.GOOD + command_cases.BAD)]


def test_fabric_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning_fabric = pytest.importorskip("lightning_fabric")
        fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    script = examples.load("fabric.py")
    loader = script.loader_of(command_cases.word_tokenizer(["<s>"]), TEXTS, 6)
    options = {"method": "lozo", "lr": 1e-2, "seed": 3}
    ours, theirs = trainer_cases.tiny_llama(), trainer_cases.tiny_llama()
    optimizer = script.train(fabric, theirs, loader, 5, journal=tmp_path / "theirs.zo", **options)
    assert optimizer.steps == 5 and optimizer.forward_passes > 5

    plain = zotune.ZerothOrder(ours, journal=tmp_path / "ours.zo", **options)

    def loss_fn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return losses.sum(dim=1) / (batch["labels"][:, 1:] != -100).sum(dim=1)

    for batch in itertools.islice(itertools.chain(loader, loader), 5):
        plain.step(loss_fn, batch)
    assert (tmp_path / "theirs.zo").read_bytes() == (tmp_path / "ours.zo").read_bytes()
    for each in (optimizer, plain):
        each.remove_hooks()
    assert trainer_cases.same_weights(dict(ours.named_parameters()), dict(theirs.named_parameters()))

    optimizer = zotune.ZerothOrder(theirs, **options)
    model, wrapped = fabric.setup(theirs, optimizer)
    batch = next(iter(loader))
    assert wrapped.step(lambda: model(**batch).loss).isfinite() and optimizer.steps == 1, "Fabric passes a closure by its name"
