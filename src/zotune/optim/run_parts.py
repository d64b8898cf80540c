"""What a run is made of: :class:`RunParts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zotune.forward.model import Probe
from zotune.methods import Method
from zotune.methods.estimators import Estimator
from zotune.methods.rules import Rule
from zotune.optim.calibration.calibrator import Calibrator
from zotune.optim.context import SampleBatches
from zotune.optim.distributed.workers import Workers
from zotune.optim.evaluator import Evaluator
from zotune.optim.guided import Guidance
from zotune.optim.state import RunState
from zotune.optim.step_transforms import StepTransform
from zotune.optim.svrg import Anchor
from zotune.rng.directions import Directions
from zotune.subspaces import LowRankCoordinate


@dataclass(frozen=True)
class RunParts:
    """The objects that take a run's steps together, and the state that they share.

    Attributes:
        model: what is trained.
        param_groups: the optimizer's, with the learning rates and weight decays of the moment.
        method, rule, estimator, directions: the four choices of a step.
        layers: low-rank coordinates whose scales are measured, by layer.
        forward: evaluates the model at a point.
        evaluator: evaluates a step's points.
        transforms: what is done to a step's coefficients, in this order.
        workers: who takes the steps together.
        calibrator: chooses ε or η, where one is measured.
        guidance: takes the steps along output gradients, where the method has some.
        anchor: the SVRG snapshot, where the method has one.
        sample_batches: more examples than a step's, where there are.
        state: what steps change.
    """

    model: nn.Module
    param_groups: list[dict[str, Any]]
    method: Method
    rule: Rule
    estimator: Estimator
    directions: Directions
    layers: list[list[LowRankCoordinate]]
    forward: Probe
    evaluator: Evaluator
    transforms: list[StepTransform]
    workers: Workers
    calibrator: Calibrator | None
    guidance: Guidance | None
    anchor: Anchor | None
    sample_batches: SampleBatches | None
    state: RunState

    @property
    def guided(self) -> bool:
        """Whether output gradients give the next step's coefficients, or gave the last one's (see ``guidance``)."""
        return self.guidance is not None and self.guidance.on

    def rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.param_groups]
