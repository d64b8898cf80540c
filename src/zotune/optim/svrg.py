"""Variance reduction by an anchor: MeZO-SVRG (2404.08080).

Now and then the weights are remembered as the anchor θ̄, with an estimate g of the gradient there from many batches. A step on one batch
then moves by ĝ(θ) − ĝ(θ̄) + g: the same batch and the same direction at both points, so that what is peculiar to the batch cancels.

Steps come in periods: ``batches`` steps that look at θ = θ̄ along one direction, a batch each, and move once, by g, at the end; then
``interval`` steps of the kind above. g is a pure function of the period's first key and its K mean coefficients, and is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zotune.forward.model import Probe
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate, Estimator
from zotune.methods.history import Past
from zotune.methods.svrg import Anchoring
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Coordinate, Offset


class _Anchored:
    """What a module is lent in place of its coordinate's weight: the anchor's."""

    def __init__(self, coordinate: Coordinate, anchor: Tensor) -> None:
        self.name, self.coordinate, self.anchor = coordinate.name, coordinate, anchor

    def moves(self, step: int, direction: int) -> bool:
        return self.coordinate.moves(step, direction)

    @tagged("update")
    def at(self, directions: Directions, offset: Offset) -> Tensor:
        move = directions.combine([(offset.key(self.name), offset.scale)], self.coordinate.shape, self.coordinate.device)
        return move.add_(self.anchor).to(self.coordinate.parameter.dtype)


class Anchor:
    """The anchor of a run.

    Attributes:
        weights: θ̄ by coordinate, float32.
        sums, count: of the coefficients at θ̄ in this period, and how many batches they come from.
    """

    def __init__(self, anchoring: Anchoring) -> None:
        self.anchoring = anchoring
        self.weights: dict[str, Tensor] = {}
        self.sums: list[float] = []
        self.count = 0

    @tagged("update")
    def difference(
        self, here: Estimate, forward: Probe, estimator: Estimator, evaluate: Callable[[], Tensor], eps: float, seed: int, step: int
    ) -> tuple[Estimate, int]:
        """(``here`` less the estimate at the anchor on the same batch along the same directions, sequences evaluated)."""
        coordinates = {c.name: _Anchored(c, self.weights[c.name]) for c in forward.coordinates}
        count = len(here.coefficients)
        with forward.instead(coordinates):
            losses = [forward.evaluate(evaluate, Offset(p.sign * eps, seed, step, p.direction)) for p in estimator.points(count)]
        there = estimator.estimate([loss.cpu() for loss in losses], eps, count)
        skipped = tuple(a or b for a, b in zip(here.skipped, there.skipped, strict=True))
        difference = (here.coefficients - there.coefficients).masked_fill(torch.tensor(skipped), 0.0)
        return here._replace(coefficients=difference, skipped=skipped), sum(loss.numel() for loss in losses)

    @tagged("update")
    def take(self, past: Past, skipped: bool, coordinates: Iterable[Coordinate]) -> tuple[list[Past], float]:
        """(estimates that a step moves by, factor of its rate); takes in what it saw."""
        place = self.anchoring.place(past.step)
        if not self.anchoring.anchors(past.step):
            first = past.step - place
            return [past, Past(first, tuple(s / max(1, self.count) for s in self.sums))], 1.0
        if place == 0:
            self.sums, self.count = [0.0] * len(past.coefficients), 0
        if not skipped:
            self.sums = [a + b for a, b in zip(self.sums, past.coefficients, strict=True)]
            self.count += 1
        if place < self.anchoring.batches - 1:
            return [], 1.0
        self.weights = {c.name: c.value().detach().clone() for c in coordinates}
        mean = tuple(s / max(1, self.count) for s in self.sums)
        return [Past(past.step - place, mean)], self.anchoring.ratio

    def numbers(self) -> dict[str, Any]:
        """What there is beside the weights, fit for JSON."""
        return {"sums": self.sums, "count": self.count}
