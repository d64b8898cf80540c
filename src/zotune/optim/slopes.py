"""Derivatives of each example's loss along a run's own directions, at the run's own weights.

A step's coefficients are means over its batch, c_k = (1/B) Σ_{i in b} s_ik, with s_ik the coefficient of example i alone at the same
weights and directions. Measured for all examples, s_ik says what the step's coefficients would have been with any other batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.forward.losses import LossFunction, evaluation
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.coefficients import FITNESS, ByDeviation, ByRootMeanSquare
from zotune.optim.optimizer import ZerothOrder
from zotune.subspaces import Blocks, Full, LowRank
from zotune.subspaces.coordinate import Offset

#: Subspaces whose directions depend on seed and step alone.
_BY_SEED = (Full, LowRank, Blocks)
WORKING = "take mezo, lozo, fzoo, mezo-adam or another method whose directions are the same for all examples and drawn by the seed"


def check(method: Method) -> None:
    """ValueError, in one sentence, where a method's coefficients are no means over examples along directions of the seed alone."""
    reason = None
    if type(method.subspace) not in _BY_SEED or method.estimator == "curvature":
        reason = "whose directions depend on the weights, the batch or the losses, and so on the order"
    elif method.own:
        reason = "where an example's direction depends on its place in the batch"
    elif method.history or method.svrg or method.selection or method.projection or method.kernel or method.conservative:
        reason = "whose steps are made of several steps' estimates or of chosen candidates"
    elif FITNESS[method.fitness] is not None:
        reason = f"with fitness {method.fitness!r}, where an example's coefficient depends on the losses of all points"
    elif method.shaping is not None and not isinstance(method.shaping, ByDeviation | ByRootMeanSquare):
        reason = "whose updates are no sums of its directions with the coefficients of the losses"
    elif method.estimator == "tangent":
        reason = "which takes derivatives in forward mode"
    if reason is not None:
        raise ValueError(f"other orders cannot be told for {method.name}, {reason}: {WORKING}.")


class SlopeMeter:
    """Measures examples along the directions of an optimizer's coming step.

    Args:
        optimizer: at the weights before the step.
        loss_fn: loss per example of a micro-batch.
        batches: micro-batches of the examples, N in all.
        count: N.

    Raises:
        ValueError: the method has no such slopes, or the model is one that is read from elsewhere as it computes.
    """

    def __init__(self, optimizer: ZerothOrder, loss_fn: LossFunction, batches: Sequence[Any], count: int) -> None:
        check(optimizer.method)
        run = optimizer.run
        if run.forward.streams or run.forward.by_engine:
            raise ValueError("other orders are told of a model in memory that torch computes: leave offloading, or the GGUF file, out.")
        self.optimizer, self.count = optimizer, count
        self._evaluate = evaluation(loss_fn, list(batches))

    @torch.no_grad()
    @tagged("activations")
    def measure(self) -> Tensor:
        """s_ik of all examples for the coming step, float64, (K, N).

        Raises:
            ValueError: there is not one loss for each example.
        """
        optimizer, run = self.optimizer, self.optimizer.run
        step, eps, k = run.state.steps, run.state.eps, optimizer.method.directions_of(run.state.steps)
        optimizer.updater.begin(step)
        points = run.estimator.points(k)
        values = torch.stack([self._losses(Offset(point.sign * eps, run.state.seed, step, point.direction)) for point in points])
        return run.estimator.singles(values, eps, k)

    @torch.no_grad()
    @tagged("activations")
    def losses(self) -> Tensor:
        """Losses of all examples at the weights as they are, float64, (N,)."""
        return self._losses(Offset(0.0, self.optimizer.run.state.seed, self.optimizer.run.state.steps, 0))

    def _losses(self, offset: Offset) -> Tensor:
        found = self.optimizer.run.forward.evaluate(self._evaluate, offset).double().cpu()
        if len(found) != self.count:
            raise ValueError("other orders need one loss for each example, and this loss function returns one number for a batch.")
        return found
