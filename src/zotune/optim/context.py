"""What a step is taken on: :class:`StepContext`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from zotune.forward.losses import LossFunction

#: In place of a batch: the loss function is a closure.
NO_BATCH: Any = object()
#: Micro-batches of about so many training examples, the same ones for a step whenever asked: examples(step, count).
SampleBatches = Callable[[int, int], list[Any]]


@dataclass(frozen=True)
class StepContext:
    """The run's seed, the step and its data: with the weights they determine the step.

    Attributes:
        seed: the run's seed.
        step: its number, from 0.
        loss_fn: loss of one micro-batch; without arguments where there is no batch.
        parts: the micro-batches; None for a closure.
    """

    seed: int
    step: int
    loss_fn: LossFunction
    parts: list[Any] | None

    def at(self, step: int) -> StepContext:
        """The same data under the directions of another step."""
        return self if step == self.step else replace(self, step=step)


def micro_batches(batch: Any) -> list[Any] | None:
    """The micro-batches of a step; None for a closure.

    Raises:
        ValueError: an empty list.
    """
    if batch is NO_BATCH:
        return None
    if not isinstance(batch, list):
        return [batch]
    if not batch:
        raise ValueError("step() was given an empty list of micro-batches.")
    return batch
