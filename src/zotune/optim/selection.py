"""Steps along a direction that is chosen from candidates by their losses, or combined from them (MeZO-Greedy, MeZO-GV)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import ESTIMATORS, Estimate
from zotune.methods.selection import Selection
from zotune.optim.evaluator import Evaluator
from zotune.optim.state import RunState, StepContext
from zotune.optim.step_transforms import StepTransform
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Coordinate, Offset


class CombinedCoordinate:
    """In place of a coordinate in full space while a combination of a step's directions is evaluated: W + scale · Σ_k w_k Z_k."""

    def __init__(self, coordinate: Coordinate, weights: Sequence[float]) -> None:
        self.name, self.coordinate, self.weights = coordinate.name, coordinate, weights

    def is_active(self, step: int, direction: int) -> bool:
        return self.coordinate.is_active(step, direction)

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset) -> Tensor:
        move = self.coordinate.weighted(directions, self.weights, offset.seed, offset.step)
        value = self.coordinate.value()
        return move.mul_(offset.scale).to(value.dtype).add_(value).to(self.coordinate.parameter.dtype)


class SelectedDirection(StepTransform):
    """A central difference along Σ_k w_k Z_k, w from the losses of the candidates."""

    def __init__(self, selection: Selection, evaluator: Evaluator, state: RunState) -> None:
        self.selection, self.evaluator, self.run_state = selection, evaluator, state

    @tagged("activations")
    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        weights = self.selection.weights(losses.values.double().mean(dim=1).tolist())
        values = torch.stack([self._evaluate(weights, sign * self.run_state.eps, context) for sign in (+1, -1)])
        self.run_state.sequences_evaluated += values.numel()
        along = Losses(values, None, 1, values.numel()).counted(context.loss_fn).estimate(ESTIMATORS["central"], self.run_state.eps)
        coefficients = len(weights) * torch.tensor(weights, dtype=torch.float64) * float(along.coefficients[0])
        skipped = tuple(bad or all(along.skipped) for bad in estimate.skipped)
        return along._replace(coefficients=coefficients.float(), skipped=skipped)

    def _evaluate(self, weights: list[float], scale: float, context: StepContext) -> Tensor:
        """The losses of the batch at θ + scale · Σ_k weights[k] · Z_k."""
        evaluate, forward = self.evaluator.function(context), self.evaluator.forward
        first = next(k for k, weight in enumerate(weights) if weight)
        if not any(weights[first + 1 :]):
            return forward.evaluate(evaluate, Offset(scale * weights[first], context.seed, context.step, first))
        with forward.replace_coordinates({c.name: CombinedCoordinate(c, weights) for c in forward.coordinates}):
            return forward.evaluate(evaluate, Offset(scale, context.seed, context.step, 0))
