"""Steps along a direction that is chosen from candidates by their losses (MeZO-Greedy)."""

from __future__ import annotations

import torch
from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import ESTIMATORS, Estimate
from zotune.methods.selection import Selection
from zotune.optim.evaluator import Evaluator
from zotune.optim.state import RunState, StepContext
from zotune.optim.step_transforms import StepTransform
from zotune.subspaces.coordinate import Offset


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
        evaluate = self.evaluator.function(context)
        return self.evaluator.forward.evaluate(evaluate, Offset(scale, context.seed, context.step, weights.index(1.0)))
