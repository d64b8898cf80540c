"""What is done to a step's coefficients between the losses and the update rule, one :class:`StepTransform` each.

A method states its transforms (:attr:`zotune.methods.Method.transforms`); this module and :mod:`zotune.optim.svrg` apply them. Before the
journal a transform changes the estimate. After it, when a record is applied, it changes the terms of the update; replaying a journal runs
this half alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import Fitness, Shaping, State
from zotune.methods.estimators import Estimate
from zotune.methods.history import CoefficientHistory, PastStep
from zotune.methods.kernel import Kernel
from zotune.optim.evaluator import Evaluator
from zotune.optim.journal_records import StepRecord
from zotune.optim.state import RunState, StepContext
from zotune.subspaces.coordinate import Offset


class Terms(NamedTuple):
    """What an update is made of.

    Attributes:
        terms: steps whose estimates are applied, one after the other.
        factor: of the learning rate.
    """

    terms: tuple[PastStep, ...]
    factor: float = 1.0


class StepTransform:
    """A transform of coefficients; by default none.

    Attributes:
        name: under which its state is saved.
    """

    name = ""

    def evaluated_at(self, context: StepContext) -> StepContext:
        """The step with the number whose directions it is evaluated along."""
        return context

    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        """The estimate that the journal records, from the one that a step's losses made, and the step's learning rates."""
        return estimate

    def after_journal(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        """The terms of the update; ``skipped``: no loss was finite, so that this step updates nothing."""
        return terms

    def state(self) -> dict[str, Any]:
        """Its state as JSON; :meth:`restore` takes it back exactly."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its state."""
        return {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from a saved state."""


class FitnessTransform(StepTransform):
    """Coefficients from the ranking of the points in place of their losses (evolution strategies)."""

    def __init__(self, fitness: Fitness) -> None:
        self.fitness = fitness

    @tagged("activations")
    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        values = losses.values.cpu()
        return estimate._replace(coefficients=self.fitness.coefficients(values[0::2], values[1::2]))


class KernelWeights(StepTransform):
    """Differences over ε r, weighted by K(r)."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        return self.weigh(estimate, context)

    @tagged("activations")
    def weigh(self, estimate: Estimate, context: StepContext) -> Estimate:
        """The estimate with its weights, which depend on the seed alone."""
        lengths = [self.kernel.length(context.seed, context.step, k) for k in range(len(estimate.coefficients))]
        weights = torch.tensor([self.kernel.weight(r) for r in lengths], dtype=torch.float32)
        return estimate._replace(coefficients=weights * estimate.coefficients)


class ConservativeChoice(StepTransform):
    """c, 0 or −c, whichever of θ − ηcZ, θ and θ + ηcZ has the lowest loss."""

    def __init__(self, evaluator: Evaluator, state: RunState) -> None:
        self.evaluator, self.run_state = evaluator, state

    @tagged("activations")
    def before_journal(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        evaluate = self.evaluator.function(context)
        if len(set(rates)) > 1:
            name = self.evaluator.method.name
            raise ValueError(f"{name} compares steps of one length: give all parameter groups the same lr.")
        c = float(estimate.coefficients[0])
        signs = (1.0, 0.0, -1.0)
        offsets = [Offset(-rates[0] * sign * c, context.seed, context.step, 0) for sign in signs]
        values = torch.stack([self.evaluator.forward.evaluate(evaluate, offset) for offset in offsets])
        self.run_state.sequences_evaluated += values.numel()
        means = Losses(values, None, 1, values.numel()).counted(context.loss_fn).values.double().mean(dim=1).tolist()
        best, lowest = 0.0, math.inf
        for sign, loss in zip(signs, means, strict=True):
            if loss < lowest:
                best, lowest = sign, loss
        return estimate._replace(coefficients=best * estimate.coefficients)


class ShapingTransform(StepTransform):
    """Coefficients rescaled by coefficients alone; ``values`` is the shaping's state."""

    name = "shaping"

    def __init__(self, shaping: Shaping, state: RunState) -> None:
        self.shaping, self.run_state = shaping, state
        self.values: State = {}

    def after_journal(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        if skipped:
            return terms
        shaped = self.shaping.shape(record.coefficients, record.skipped, self.run_state.eps, self.values)
        return terms._replace(terms=(PastStep(record.step, tuple(shaped)),))

    def state(self) -> dict[str, Any]:
        return dict(self.values)

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.values = dict(state)


class HistoryTransform(StepTransform):
    """Records the coefficients of the last steps, ``past``, from which ``history`` computes the update."""

    name = "history"

    def __init__(self, history: CoefficientHistory) -> None:
        self.history = history
        self.past: list[PastStep] = []

    def past_of(self, name: str) -> list[PastStep]:
        """The steps that a coordinate's update is computed from."""
        return self.past

    def after_journal(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        if not skipped:
            self.past = [*self.past, *terms.terms][-self.history.length :]
        return terms

    def state(self) -> dict[str, Any]:
        return {"past": [[past.step, list(past.coefficients)] for past in self.past]}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.past = [PastStep(step, tuple(coefficients)) for step, coefficients in state["past"]]
