"""What a recorded evaluation reads is brought in from outside; that it equals the evaluation on a device is in test_cuda.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, objectives
from zotune.forward import batches
from zotune.forward.batch_context import BatchContext
from zotune.forward.cuda_graphs import CudaGraphs
from zotune.methods.estimators import Point


def optimizer(model: nn.Module, method: str = "lozo", **options) -> ZerothOrder:
    return ZerothOrder(model, toys.method(method, interval=3), lr=1e-3, forward_batching="batched", **options)


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cuda_graphs must be True, False or 'auto', not 'always'"):
        optimizer(toys.classifier(), cuda_graphs="always")


def test_nothing_is_recorded_on_a_cpu():
    model = toys.classifier()
    steps = optimizer(model, cuda_graphs=True)
    steps.step(toys.loss_function(model), toys.batch())
    assert not steps.evaluator.graphs.enabled


@pytest.mark.parametrize("method", ["lozo", "lozo-e", "mezo"])
def test_directions_that_are_held_are_renewed(method):
    """A held evaluation at step 7 is the evaluation at step 7, though its context was made at step 3, before a fold."""
    model = toys.classifier()
    steps = optimizer(model, method)
    loss, (tokens, classes) = toys.loss_function(model), toys.batch(6)
    for _ in range(2):
        steps.step(loss, (tokens, classes))

    def stack(step: int) -> batches.BatchLayout:
        return batches.shared_layout([Point(+1, 0), Point(-1, 0), Point(+1, 2)], 1e-2, 6, seed=0, step=step)

    def function() -> torch.Tensor:
        return loss((tokens.repeat(3, 1), classes.repeat(3, 1)))

    forward = steps.forward
    context = BatchContext(stack(3), forward.directions, forward.siblings, persistent=True)
    first = forward.evaluate_in(function, context)
    assert torch.equal(first, forward.evaluate_batched(function, stack(3)))
    steps.flush_updates()
    context.advance(stack(7))
    second = forward.evaluate_in(function, context)
    assert torch.equal(second, forward.evaluate_batched(function, stack(7)))
    assert not torch.allclose(first, second, rtol=1e-6)


def test_only_tensor_batches_and_capturable_losses_are_recorded():
    model = toys.transformer("opt")
    forward = optimizer(model).forward
    ours, own = objectives.LanguageModelLoss(model), toys.transformer_loss(model)
    rows = {"input_ids": toys.tokens()}
    auto, always = CudaGraphs(forward, "auto"), CudaGraphs(forward, True)
    assert auto.captures(ours, rows) and not auto.captures(own, rows) and always.captures(own, rows)
    for more in ("text", 3, None, torch.tensor(1.0)):
        assert not auto.captures(ours, rows | {"more": more}) and not always.captures(ours, rows | {"more": more})
    large = torch.zeros(1 << 20, 1 << 20, dtype=torch.long, device="meta")
    assert not auto.captures(ours, {"input_ids": large}) and always.captures(own, {"input_ids": large})


def test_the_objectives_say_so():
    for objective in (objectives.LanguageModelLoss, objectives.ChoiceLoss, objectives.ClassifierLoss):
        assert objective.capturable and "capturable" not in {field.name for field in dataclasses.fields(objective)}
