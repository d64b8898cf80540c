"""The loss of a trainer without an objective: the one that the model, or the user's `compute_loss`, makes of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from zotune.errors import NotBatchableError
from zotune.forward.batches import batch_rows, take_rows
from zotune.objectives import IGNORE, label_losses
from zotune.objectives.label_losses import LabelLoss
from zotune.optim.distributed import partition
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.training.evaluation import Batch, LossFunction, Objective, bound, layout
from zotune.weights.structure import head_of, module_mode

#: Examples whose loss shows whether it is one number for each.
SAMPLE = 8
#: Key of a micro-batch's factor, without dimensions, where the loss is one number per batch.
FACTOR = "_factor"


class ModelLoss:
    """The loss of a trainer's batches of labels: one per example where the model's own is known as such, else one per micro-batch.

    A loss per micro-batch is weighted by its number of labels, so that micro-batches have the loss of the batch of all.

    Args:
        trainer: computes the loss of a batch.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._form: str | None = None
        self._per_example: LabelLoss | None = None
        self._decided = False
        self._divides: bool | None = None

    @property
    def users(self) -> bool:
        """Whether the loss is not the model's alone."""
        trainer = self.trainer
        changed = type(trainer).compute_loss is not Trainer.compute_loss
        return changed or trainer.compute_loss_func is not None or trainer.label_smoother is not None

    @property
    def form(self) -> str | None:
        """The form of the model's loss per example; None: unknown so far, or none."""
        return None if self._per_example is None else self._per_example.form

    def per_example(self, batch: Batch) -> LabelLoss | None:
        """The model's loss per example; None where it is unknown. It is found from the first batch."""
        if not self._decided:
            model: nn.Module = self.trainer.model
            find = partial(self.at_weights, partial(label_losses.find, model, batch))
            form = None if self.users or not _has_rows(batch) else self.trainer.workers.from_first(find)
            self._per_example, self._decided = None if form is None else LabelLoss(model, form), True
        return self._per_example

    def is_guidable(self, objective: Objective | None) -> bool:
        """Whether steps can go along output gradients of an objective, or None, of the loss of labels."""
        known = objective in (None, "lm", "generation", "choices", "mlm") and self.form in (None, "next token")
        return known and head_of(self.trainer.model) is not None

    def is_per_example(self, batch: Batch, objective: Objective | None) -> bool:
        """Whether an objective (None: that of the batch's keys, or the loss of labels) is one number for each example."""
        if objective is None:
            return layout(batch) is not None or self.per_example(batch) is not None
        loss_fn = bound(objective, self.trainer.model)
        try:
            loss = self.at_weights(lambda: loss_fn(batch))
            return getattr(loss, "shape", ()) == (batch_rows(batch),)
        except NotBatchableError:
            return False
        except Exception:  # the first step raises it, where a journal says so
            return True

    def step(self, batches: Sequence[Batch], num_items_in_batch: Tensor | int | None = None) -> tuple[LossFunction, list[Batch]]:
        """The loss function, and the micro-batches of a step for it."""
        found = self.per_example(batches[0])
        if found is not None:
            return found, list(found.batches(batches))
        if self.trainer.workers.several:
            batches = [piece for batch in batches for piece in _split(batch, self.trainer.workers.size)]
        if self.users:
            # By transformers' contract such a loss may be divided by the labels of all micro-batches, whose mean is taken here.
            factors = [float(len(batches) if self._is_divided(batches, num_items_in_batch) else 1)] * len(batches)
        else:
            num_items_in_batch = None  # the model takes the mean of each micro-batch, whatever it is given
            shifted = bool(getattr(self.trainer, "_loss_shifts_labels", False))
            items = [_items(batch, shifted) for batch in batches]
            factors = [len(batches) * count / max(sum(items), 1) for count in items]

        def loss_of_labels(batch: Batch) -> Tensor:
            inputs = {name: value for name, value in batch.items() if name != FACTOR}
            loss: Tensor = self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=num_items_in_batch)
            return loss * batch[FACTOR].to(loss.device)

        return loss_of_labels, [{**batch, FACTOR: torch.tensor(factor)} for batch, factor in zip(batches, factors, strict=True)]

    def at_weights(self, function: Callable[[], Any]) -> Any:
        """``function()`` in evaluation mode, without gradients; torch's global generators are as before afterwards."""
        with torch.no_grad(), module_mode(self.trainer.model, training=False), isolated_generators(Key(0, 0, 0, "", "loss"), _devices()):
            return function()

    def _is_divided(self, batches: Sequence[Batch], num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is divided by the number of items that it is given: it says so, or it halves where that number is doubled."""
        if self.trainer.loss_is_scaled_for_ga is not None:
            return self.trainer.loss_is_scaled_for_ga
        if num_items_in_batch is None or len(batches) == 1:
            return False
        if self._divides is None:

            def loss(items: Tensor | int) -> float:
                found = self.trainer.compute_loss(self.trainer.model, dict(batches[0]), num_items_in_batch=items)
                return float(found.detach().float().mean())

            once, twice = self.at_weights(lambda: (loss(num_items_in_batch), loss(num_items_in_batch * 2)))
            self._divides = abs(once - 2 * twice) < abs(once - twice)
        return self._divides


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []


def _split(batch: Batch, pieces: int) -> list[Batch]:
    """A batch in contiguous pieces, at most one per example."""
    rows = batch_rows(batch)
    return [take_rows(batch, torch.arange(piece.start, piece.stop), rows) for piece in partition.cut(rows, min(pieces, rows))]


def _has_rows(batch: Any) -> bool:
    try:
        return batch_rows(batch) > 0
    except NotBatchableError:
        return False


def _items(batch: Batch, shifted: bool) -> int:
    """Labels of a micro-batch, without the first of each text where they are ``shifted``; else its examples, or 1."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() and not labels.is_floating_point():
        return int((labels[..., 1:] if shifted and labels.dim() > 1 else labels).ne(IGNORE).sum())
    return batch_rows(batch) if _has_rows(batch) else 1
