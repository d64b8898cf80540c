"""The window of past differences of the head's input (PseuZO); :mod:`zotune.optim.output_window` takes the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import State
from zotune.methods.history import CoefficientHistory, PastStep, terms_of
from zotune.rng.directions import Directions
from zotune.subspaces.base import at_least_one
from zotune.subspaces.coordinate import Coordinate

#: Values of λ in a cycle that are not 0, and how fast they fall.
VALUES, FALL = 11, 10


@dataclass(frozen=True)
class OutputWindow(CoefficientHistory):
    """θ ← θ − η Σ_j ĝ_j over the last h steps j, their coefficients made anew in every step.

    Args:
        length: h.
        epoch: steps of one λ.
        cycle: steps after which the window begins anew, and λ at 1.

    Raises:
        ValueError: a value is out of range.
    """

    length: int = 14
    epoch: int = 63
    cycle: int = 5000

    def __post_init__(self) -> None:
        for label, number in (("window", self.length), ("epoch", self.epoch), ("cycle", self.cycle)):
            at_least_one(label, number)

    def decay(self, step: int) -> float:
        """λ of a step: 1 / (1 + 10 e) in epoch e of a cycle, 0 after epoch 10."""
        epoch = step % self.cycle // self.epoch
        return 1 / (1 + FALL * epoch) if epoch < VALUES else 0.0

    def begins(self, step: int) -> bool:
        """Whether the window begins anew with a step."""
        return step % self.cycle == 0

    @tagged("update")
    def update(self, coordinate: Coordinate, value: Tensor, past: Sequence[PastStep], lr: float, directions: Directions, seed: int) -> None:
        terms = [term for step in past for term in terms_of(coordinate, step, seed, 1.0)]
        value.add_(directions.combine(terms, coordinate.shape, coordinate.device).to(value.dtype), alpha=-lr)

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        raise ValueError("learning rate 'auto' is not known for PseuZO, whose steps take up to a window of estimates; give a number.")
