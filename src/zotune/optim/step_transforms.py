"""What is done to a step's coefficients between the losses and the update rule, one :class:`StepTransform` each.

Before the journal a transform changes the estimate: coefficients are made of ranks (:class:`FitnessTransform`), lessened by those at the
SVRG snapshot (:class:`SnapshotCorrection`), or signed so that the loss is lowest (:class:`ConservativeChoice`). After it, when a record is
applied, a transform changes the terms of the update (:class:`Shaped`, :class:`History`); replaying a journal goes through this half alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.coefficients import FITNESS, Fitness, Shaping
from zotune.methods.estimators import Estimate, Estimator
from zotune.methods.history import Past, Replayed
from zotune.optim.context import StepContext
from zotune.optim.evaluator import Evaluator
from zotune.optim.journal import StepRecord
from zotune.optim.state import RunState
from zotune.optim.svrg import Anchor
from zotune.subspaces.coordinate import Offset


class Terms(NamedTuple):
    """What an update is made of.

    Attributes:
        terms: steps whose estimates are applied, one after the other.
        factor: of the learning rate.
    """

    terms: tuple[Past, ...]
    factor: float = 1.0


class StepTransform:
    """One thing that is done to coefficients; as it is, nothing."""

    def measured(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        """What the journal is to hold, of the estimate that a step's losses made and its learning rates."""
        return estimate

    def applied(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        """What the update is made of; ``skipped``: no loss was finite, nothing is trained in this step."""
        return terms


class FitnessTransform(StepTransform):
    """Coefficients of the ranking of the points in place of their losses (evolution strategies)."""

    def __init__(self, fitness: Fitness) -> None:
        self.fitness = fitness

    @tagged("activations")
    def measured(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        means = losses.values.double().mean(dim=1).cpu()
        return estimate._replace(coefficients=self.fitness.coefficients(means[0::2], means[1::2]))


class SnapshotCorrection(StepTransform):
    """c_k less the coefficient at the SVRG snapshot θ̄ on the same batch, and the snapshot's own estimate beside it (2404.08080)."""

    def __init__(self, anchor: Anchor, evaluator: Evaluator, estimator: Estimator, state: RunState) -> None:
        self.anchor, self.evaluator, self.estimator, self.state = anchor, evaluator, estimator, state

    def measured(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        if self.anchor.anchoring.anchors(context.step):
            return estimate
        evaluate, forward = self.evaluator.function(context), self.evaluator.forward
        found, evaluated = self.anchor.difference(estimate, forward, self.estimator, evaluate, self.state.eps, context.seed, context.step)
        self.state.sequences_evaluated += evaluated
        return found

    def applied(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        past, factor = self.anchor.take(terms.terms[0], skipped, self.evaluator.forward.coordinates)
        return Terms(tuple(past), factor)


class ConservativeChoice(StepTransform):
    """c, 0 or −c, whichever of θ − ηcZ, θ and θ + ηcZ has the lowest loss."""

    def __init__(self, evaluator: Evaluator, state: RunState, name: str) -> None:
        self.evaluator, self.state, self.name = evaluator, state, name

    @tagged("activations")
    def measured(self, estimate: Estimate, losses: Losses, context: StepContext, rates: tuple[float, ...]) -> Estimate:
        evaluate = self.evaluator.function(context)
        if len(set(rates)) > 1:
            raise ValueError(f"{self.name} compares steps of one length: give all parameter groups the same lr.")
        best, lowest = 0.0, math.inf
        c = float(estimate.coefficients[0])
        for sign in (1.0, 0.0, -1.0):
            loss = self._loss(evaluate, Offset(-rates[0] * sign * c, context.seed, context.step, 0))
            if loss < lowest:
                best, lowest = sign, loss
        return estimate._replace(coefficients=best * estimate.coefficients)

    @tagged("activations")
    def _loss(self, evaluate: Callable[[], Tensor], offset: Offset) -> float:
        losses = self.evaluator.forward.evaluate(evaluate, offset)
        self.state.sequences_evaluated += losses.numel()
        return float(losses.double().mean())


class Shaped(StepTransform):
    """Coefficients rescaled by what is known of coefficients alone (see ``shaping``)."""

    def __init__(self, shaping: Shaping, state: RunState) -> None:
        self.shaping, self.state = shaping, state

    def applied(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        if skipped:
            return terms
        shaped = self.shaping.shape(record.coefficients, record.skipped, self.state.eps, self.state.shaping)
        return terms._replace(terms=(Past(record.step, tuple(shaped)),))


class History(StepTransform):
    """Keeps the last steps' coefficients, of which moments are made (see ``replayed``)."""

    def __init__(self, replayed: Replayed, state: RunState) -> None:
        self.replayed, self.state = replayed, state

    def applied(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        if not skipped:
            self.state.past = [*self.state.past, *terms.terms][-self.replayed.history :]
        return terms


def transforms_of(
    method: Method, evaluator: Evaluator, estimator: Estimator, anchor: Anchor | None, state: RunState
) -> list[StepTransform]:
    """What a method does to coefficients, in the order in which it is done."""
    found: list[StepTransform] = []
    fitness = FITNESS[method.fitness]
    if fitness is not None:
        found.append(FitnessTransform(fitness))
    if anchor is not None:
        found.append(SnapshotCorrection(anchor, evaluator, estimator, state))
    if method.conservative:
        found.append(ConservativeChoice(evaluator, state, method.name))
    if method.shaping is not None:
        found.append(Shaped(method.shaping, state))
    if method.replayed is not None:
        found.append(History(method.replayed, state))
    return found
