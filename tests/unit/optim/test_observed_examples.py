"""What a phase of LOZO-G observes depends on the examples, not on the forwards that they are cut into."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from trainer_cases import HIGH, LOW, tiny_llama
from zotune import ZerothOrder, methods, objectives
from zotune.subspaces import residual_check
from zotune.subspaces.guided import GuidedCoordinate

LENGTHS = [3 + 7 * number % 17 for number in range(48)]


def collated(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded to the longest; the token after the last is scored."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    texts = [torch.randint(0, 90, (LENGTHS[n],), generator=g) for n, g in zip(numbers, generators, strict=True)]
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    targets = torch.tensor([[LOW if text[0] < 45 else HIGH] for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": mask, "positions": lengths.unsqueeze(1) - 1, "targets": targets}


def coefficients(cut: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Coefficients of six steps where examples are observed so many at a time, and the last phase's V."""
    model = tiny_llama()
    sample = lambda step, count: [collated(range(at, min(at + cut, count))) for at in range(0, count, cut)]  # noqa: E731
    method = methods.lozo_g(interval=3, rank=2, guide=2, examples=44)
    optimizer = ZerothOrder(model, method, lr="auto", sample_batches=sample, forward_batching="batched")
    loss_fn, found = objectives.LanguageModelLoss(model), []
    for step in range(6):
        optimizer.step(loss_fn, collated([(8 * step + place) % 48 for place in range(8)]))
        found.append(optimizer.last_report.coefficients)
    factors = [c.v.clone() for c in optimizer.forward.coordinates if isinstance(c, GuidedCoordinate)]
    assert optimizer.run.along_output_gradients
    optimizer.remove_hooks()
    return found, factors


def test_the_cut_of_the_examples_changes_no_step() -> None:
    whole, v = coefficients(16)
    for cut in (3, 8):
        found, factors = coefficients(cut)
        for one, other in zip(found, whole, strict=True):
            # an element of V that is rounded to the other side of its eight bits moves coefficients by this
            assert one.tolist() == pytest.approx(other.tolist(), rel=2e-3, abs=4e-3 * float(other.abs().max())), cut
        assert all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(factors, v, strict=True))


def test_the_residual_check_takes_rows_not_batches() -> None:
    model = tiny_llama()
    loss_fn = objectives.LanguageModelLoss(model)
    layers = {module: name for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj", "q_proj"))}
    found = []
    for cut in (48, 16, 4, 3):
        losses = lambda cut=cut: (loss_fn(collated(range(at, min(at + cut, 48)))) for at in range(0, 48, cut))  # noqa: E731
        with torch.no_grad():
            found.append(residual_check.gains(layers, losses, 256, 0, 0)[0])
    assert all(gains == pytest.approx(found[0], rel=1e-3, abs=1e-4) for gains in found)
