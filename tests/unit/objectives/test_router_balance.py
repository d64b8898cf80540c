"""The load-balancing loss of a mixture of experts is part of the loss where the model is configured so."""

from __future__ import annotations

import pytest
import torch

import zotune
from any_modules import build
from zotune.objectives import LanguageModelLoss

NAMES = ["mixtral", "qwen2-moe", "gpt-oss"]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    positions = torch.tensor([[2, 5], [1, 3], [0, 5]])
    return {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": ids.gather(1, positions + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_an_examples_balance_is_that_of_transformers(name):
    model, rows = build(name, router_aux_loss_coef=0.7), batch()
    with torch.no_grad():
        plain = LanguageModelLoss(model)(rows)
        model.config.output_router_logits = True
        found = LanguageModelLoss(model)(rows) - plain
        for row in range(3):
            one = {key: rows[key][row : row + 1] for key in ("input_ids", "attention_mask")}
            expected = model(**one, labels=one["input_ids"], output_router_logits=True, use_cache=False).aux_loss
            assert torch.allclose(found[row], 0.7 * expected, atol=1e-4)
    assert found.std() > 1e-3


def test_the_router_is_trained_by_the_balance_alone():
    """Of a loss that is the balance alone, it falls."""
    model, rows = build("mixtral", router_aux_loss_coef=1.0, output_router_logits=True), batch()
    loss = LanguageModelLoss(model)

    def balance(some: dict[str, torch.Tensor]) -> torch.Tensor:
        found = loss(some)
        model.config.output_router_logits = False
        try:
            return found - loss(some)
        finally:
            model.config.output_router_logits = True

    with torch.no_grad():
        before = balance(rows).mean()
    optimizer = zotune.ZerothOrder(model, zotune.methods.mezo(eps=1e-2), lr=3e-3, forward_batching="sequential")
    for _ in range(30):
        optimizer.step(balance, rows)
    with torch.no_grad():
        assert balance(rows).mean() < before
