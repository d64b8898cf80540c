"""Steps along output gradients: phases in which a step is one forward pass (``lozo-g``).

**Derivatives.** With δ_i the output gradient at scored position i (:mod:`zotune.objectives.output_gradients`) and x_i a layer's input
there, the loss of a layer that adds W x to the hidden state has about the derivatives Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ along the elements of S in W + P
S Vᵀ, as if nothing stood between the layer and the head (direct feedback alignment, 1609.01596). They come per example, (C, N), with the
forward that evaluates the losses. Only those of the last layer are exact, up to a factor of each position.

**Steps.** With plain SGD as the update rule a step goes along D, the orthogonal factors of the layers' running means of derivatives
(:class:`~zotune.subspaces.guided.GuidedCoordinate`), whatever the size of these. Along d = D / ‖D‖ of a run's first step, the losses at θ ±
ρ d give slope and curvature, and the minimum of their parabola is slope / curvature away; a measured η takes a twentieth of that way, the
same for the whole run, in proportion to √N of a batch of N examples (of 16: a twentieth). At the start of each later phase the losses one
step to either side are compared: where the loss does not fall, the next phase has drawn directions.

**Other rules** are given α ĝ, the derivatives' mean with a scale: along ĝ / ‖ĝ‖ the losses give the true slope, α = slope / ‖ĝ‖. With the
curvature h of the same losses, the moment M = ‖αĝ‖² of the steps and the signal s of it that examples agree on, η = 1 / (h M / s + ¼ h),
twice that of coefficients along drawn directions (:mod:`zotune.optim.calibration.step_size`): here the noise is the batch's alone.

**Phases.** The first phase goes along output gradients. After a number of them comes one with drawn directions; that number doubles as long
as a step of the latter lowers the loss less per evaluation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.forward.batches import examples_of
from zotune.forward.losses import as_losses
from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate
from zotune.methods.rules import Rule
from zotune.objectives.output_gradients import recording
from zotune.optim.calibration.gains import rule_gain
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.signal_prior import GuessedSignal
from zotune.optim.calibration.step_size import REACH, StepSize
from zotune.optim.evaluator import Evaluator
from zotune.optim.layer_slopes import LayerSlopes
from zotune.optim.state import StepContext
from zotune.optim.step_distance import FARTHER, MAX_SAMPLES, Sample, StepDistance
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.activation import observing_inputs
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.guided import GuidedCoordinate
from zotune.weights.structure import trained_layers

#: Distance from θ, as a norm of all S, at which the first slope is measured; an S of norm 1 is a change of the size of a weight.
NEAR = 1e-2
#: The least distance where an engine rounds activations to 8 bits: nearer, differences of losses are rounding, and slopes and curvatures
#: made of them shrink steps and distances further.
ROUNDED = 1 / 256
#: Steps between measurements if rates are measured, beside steps 1, 2, 4, 8, ...
EVERY = 20
#: How many times as far the loss has to fall where a slope is measured farther away.
WORTH = 1.5
#: Steps this many times longer than the distance last sampled are sampled first.
LONGER = REACH
#: Phases with output gradients before the first with drawn directions, and the most between two of those.
MIN_PHASES, MAX_PHASES = 16, 256
#: η as a multiple of the one for drawn directions.
BOLD = 2.0
#: The signal's part of a derivative's square where a batch has one loss. It was best in runs of single examples, which were worse where it
#: followed the falls that steps achieved, as that of drawn directions does.
ALONE = 0.25
#: Weight of a new measurement of α.
FORGETTING = 0.25


class Derivatives(NamedTuple):
    """What one forward pass provides about a batch.

    Attributes:
        losses: (N,), float32 on the CPU.
        slopes: the derivative of each example's loss along every element of S of the active layers, (C, N), not scaled yet.
        evaluated: sequences that went through the model.
        examples: of the batch, of which the loss may be one.
    """

    losses: Tensor
    slopes: Tensor
    evaluated: int
    examples: int


class OutputGradientSteps:
    """Takes the measurements of steps along output gradients, and chooses the phases.

    Args:
        forward: evaluates the model.
        evaluator: for the split of work among workers.
        rule: the update rule.
        interval: steps of a phase.
        measured: whether rates are measured; else scales alone are.
    """

    def __init__(self, forward: PerturbedForward, evaluator: Evaluator, rule: Rule, interval: int, measured: bool) -> None:
        self.forward, self.evaluator, self.rule = forward, evaluator, rule
        self.interval, self.measured = interval, measured
        self.coordinates = [c for c in forward.coordinates if isinstance(c, GuidedCoordinate)]
        if not rule.plain:  # another rule has means of its own
            for coordinate in self.coordinates:
                coordinate.momentum = None
        self.layers = trained_layers(forward.model, {id(c.parameter): c for c in self.coordinates})
        self.size = StepSize(guess=GuessedSignal(ALONE, held=False))
        self.scale = RunningMean(FORGETTING)  # α
        self.distance = StepDistance()  # of a normalized step
        self._told: tuple[Tensor, Tensor, float] | None = None  # derivatives of a step, what it goes along, and the length of that
        self.wall = math.inf  # how far a step may go, where going farther was seen to be no better
        self.phases = 0  # with output gradients since the last one with drawn directions
        self.limit_phases()
        self.drawn_phases = 0  # with drawn directions, in all
        self.forwards = self.sequences = 0  # of the last measurement
        self.lost = False  # a batch of this phase had losses without output gradients

    @property
    def active_coordinates(self) -> list[GuidedCoordinate]:
        """The coordinates that this phase trains along output gradients, in the order of their elements."""
        return [c for c in self.coordinates if c.guided]

    @property
    def active(self) -> bool:
        """Whether this phase goes along output gradients."""
        return any(c.guided for c in self.coordinates)

    @property
    def rejected(self) -> list[str] | None:
        """Names of the layers that do not write to the residual stream; None before they are known."""
        return [c.name for c in self.coordinates if not c.writes] if all(c.writes is not None for c in self.coordinates) else None

    def reject(self, names: Collection[str]) -> None:
        """Take the run's check as done, with this result."""
        for coordinate in self.coordinates:
            coordinate.writes = coordinate.name not in names

    def parts(self, elements: Tensor) -> list[tuple[GuidedCoordinate, Tensor]]:
        """The part of all elements (C,) of each active coordinate."""
        active = self.active_coordinates
        return list(zip(active, elements.split([c.num_guided for c in active]), strict=True))

    # -- phases -----------------------------------------------------------------------------------------------------------------------

    def limit_phases(self, least: int = MIN_PHASES, most: int = MAX_PHASES) -> None:
        """Phases with output gradients before the first with drawn directions, and the most between two of those."""
        self.phase_limits = least, most
        self.max_phases = least

    def choose_phase(self, drawn: StepSize | None, evaluations: int) -> bool:
        """Whether the phase that begins goes along output gradients, if the loss provides them.

        Args:
            drawn: what is known of steps along drawn directions, where rates are measured.
            evaluations: of the batch in such a step; a step along output gradients makes one.
        """
        if self.active:
            self.phases += 1
            return self.phases < self.max_phases and self.alpha > 0 and not self.lost
        if self.drawn_phases and drawn is not None:
            worth = (drawn.expected_fall or 0.0) / evaluations >= (self.size.expected_fall or 0.0)
            least, most = self.phase_limits
            self.max_phases = least if worth else min(2 * self.max_phases, most)
        self.phases = 0
        return True

    def phase_began(self) -> None:
        """Record that a phase has begun."""
        self.lost = False
        if self.active:
            self.size.fade()
        else:
            self.drawn_phases += 1

    # -- derivatives ----------------------------------------------------------------------------------------------------------------

    @tagged("activations")
    def derivatives(self, context: StepContext) -> Derivatives:
        """Losses of the step's examples at θ, and their derivatives."""
        active = self.active_coordinates
        layers = {layer: coordinate for layer, coordinate in self.layers.items() if coordinate.guided}
        key = Key(context.seed, context.step, 0, "", "loss")

        def rows_of(call: Callable[[], Any]) -> Tensor:
            @tagged("activations")
            def work() -> Tensor:
                with isolated_generators(key, self.forward.devices), recording() as recorder:
                    inputs = LayerSlopes(recorder, layers)
                    with observing_inputs(layers, inputs.record), recorder.following():
                        returned = call()
                        valid = recorder.end_call(returned)
                        losses = as_losses([returned])
                found = inputs.slopes(active, losses.numel()).to(losses.device)
                return torch.cat([losses.unsqueeze(0), valid.to(losses).unsqueeze(0), found])

            return self.forward.evaluate(work, None)

        values, evaluated = self.evaluator.table(context, 2 + sum(c.num_guided for c in active), rows_of)
        values = values.cpu()
        if not self.lost and not bool(values[1].all()):
            self.lost = True
            warnings.warn(
                "a batch's loss is no constant multiple of the recorded one: its output gradients are left out, and the next phase goes "
                "along drawn directions.",
                stacklevel=2,
            )
        return Derivatives(values[0], values[2:], evaluated, len(values[0]) if len(values[0]) > 1 else examples_of(context.parts))

    @property
    def alpha(self) -> float:
        """α, the factor of all derivatives."""
        return max(0.0, self.scale.mean) if self.scale.count else 1.0

    @tagged("activations")
    def estimate(self, found: Derivatives) -> Estimate:
        """The derivative along every element of S as a coefficient, bfloat16 as the journal stores it; a non-finite one skips the step."""
        loss = float(found.losses.double().mean())
        factor = float(self.alpha > 0) if self.normalizes else self.alpha  # 0: the loss does not fall that way
        coefficients = factor * found.slopes.double().mean(dim=1)
        good = math.isfinite(loss) and bool(coefficients.isfinite().all())
        kept = coefficients.bfloat16().float() if good else torch.zeros(len(coefficients))
        return Estimate(loss if good else math.nan, kept, (not good,) * len(kept), math.nan, None)

    @property
    def normalizes(self) -> bool:
        """Whether a step's length does not depend on that of its derivatives."""
        return any(c.momentum is not None for c in self.active_coordinates)

    @tagged("activations")
    def direction(self, found: Derivatives) -> tuple[Tensor, float]:
        """What a step of these derivatives goes along, (C,) float64, of length 1, and its length before the rate; else NaN."""
        if self._told is not None and self._told[0] is found.slopes:  # the step's, whose scale or distance was measured
            return self._told[1:]
        mean = found.slopes.double().mean(dim=1)
        if not bool(mean.isfinite().all()):
            return mean, math.nan
        parts = [coordinate.step_direction(part.bfloat16().float()).double() for coordinate, part in self.parts(mean)]
        along = torch.cat(parts) if self.normalizes else mean
        length = float(along.norm())
        self._told = found.slopes, along / max(length, 1e-30), length
        return self._told[1:]

    # -- scale and rate -----------------------------------------------------------------------------------------------------------------

    @tagged("activations")
    def measure(self, found: Derivatives, evaluate: Callable[[], Tensor], seed: int, step: int) -> None:
        """Measure the slope and curvature along a step, where that is due; ``evaluate`` returns the losses of the step's examples."""
        self.forwards = self.sequences = 0
        if not self._due(step):
            return
        along, length = self.direction(found)
        if not (math.isfinite(length) and length > 0):
            return
        with self._along(along):
            if self.normalizes:
                predicted = float(found.slopes.double().mean(dim=1) @ along)
                sample = partial(self._sample, found, evaluate, seed=seed, step=step)
                self.distance.measure(sample, predicted, found.examples, self.size, self.scale, self.measured, self.forward.rounds)
            else:
                self._measure_derivatives(found, evaluate, along, length, seed, step)
        if self.scale.mean <= 0:
            self.size.expected_fall = 0.0

    def _sample(self, found: Derivatives, evaluate: Callable[[], Tensor], radius: float, *, seed: int, step: int) -> Sample:
        plus, minus = (self._at(evaluate, sign * radius, seed, step) for sign in (1.0, -1.0))
        slope = float((plus - minus).double().mean()) / (2 * radius)
        curvature = (plus + minus - 2 * found.losses).double() / radius**2
        finite = math.isfinite(slope) and bool(curvature.isfinite().all())
        return Sample(slope, curvature, float((found.losses - minus).double().mean()), finite)

    def _measure_derivatives(
        self, found: Derivatives, evaluate: Callable[[], Tensor], along: Tensor, norm: float, seed: int, step: int
    ) -> None:
        """The scale α of derivatives, and what their rate needs, at the distances where steps go."""
        size, far, fall = self.size, self.size.radius or NEAR, -math.inf
        least = ROUNDED if self.forward.rounds else 0.0
        radius = max(least, min(size.stride, LONGER * far) if size.stride > 0 else far)
        self.wall = math.inf
        for sample in range(MAX_SAMPLES):
            seen = self._sample(found, evaluate, radius, seed=seed, step=step)
            if not seen.finite:
                radius, size.stride = radius / FARTHER, radius / FARTHER  # no step may go there
                continue
            if sample and radius > size.radius and seen.lower < WORTH * fall:  # where a loss is level no curvature tells how far is far
                self.wall = REACH * size.radius
                break
            fall = seen.lower
            if sample:
                self.scale = RunningMean(FORGETTING)  # only what is measured where steps go counts
            size.sample_at(radius)
            size.record_curvature(seen.curvature.unsqueeze(0))
            self.scale.add(seen.slope / norm)
            if not self.measured or self.alpha == 0:
                break
            self._record_first(found, self.alpha * norm)
            size.rate(1, len(found.losses))
            if radius / FARTHER <= size.stride <= FARTHER * radius or (radius == least and size.stride < least):
                break
            radius = max(least, min(max(size.stride, radius / FARTHER), FARTHER * radius))

    def _due(self, step: int) -> bool:
        size = self.size
        if not step % self.interval or not self.scale.count:
            return True
        if not self.measured or self.normalizes:
            return False
        longer = min(size.stride, self.wall) > LONGER * size.radius
        return longer or not size.taken % EVERY or not size.taken & (size.taken - 1)

    def _at(self, evaluate: Callable[[], Tensor], scale: float, seed: int, step: int) -> Tensor:
        losses = self.forward.evaluate(evaluate, Offset(scale, seed, step, 0), only={c.name for c in self.active_coordinates})
        self.forwards += 1
        self.sequences += losses.numel()
        return losses.cpu()

    @contextmanager
    def _along(self, direction: Tensor) -> Iterator[None]:
        """Within, S of all layers are evaluated along ``direction`` (C,)."""
        try:
            for coordinate, part in self.parts(direction.float()):
                coordinate.fixed_direction = part
            yield
        finally:
            for coordinate in self.coordinates:
                coordinate.fixed_direction = None

    def _record_first(self, found: Derivatives, norm: float) -> None:
        """Record what a rate needs before the first step: the moment."""
        if not self.size.moment.count:
            self.size.moment.add(norm**2)
            self.size.record_examples(self._of_examples(found))
        self.size.latest = norm**2

    @tagged("activations")
    def _of_examples(self, found: Derivatives) -> Tensor:
        """Scaled derivatives of single examples, (C, N), of a size such that their mean square is that of the step's."""
        return math.sqrt(len(found.slopes)) * self.alpha * found.slopes.double()

    def rate(self, found: Derivatives, estimate: Estimate, step: int) -> float:
        """η for a step of ``estimate``, for the update rule."""
        size = self.size
        if self.normalizes:
            along, length = self.direction(found)
            slope = self.alpha * float(along @ found.slopes.double().mean(dim=1)) if math.isfinite(length) else 0.0
            size.record_step([slope], estimate.loss)
            size.expected_fall = 0.5 * self.distance.value * max(0.0, slope)
            self._told = None
            return size.brake * self.distance.value / length if length > 0 else 0.0
        size.record_examples(self._of_examples(found))
        size.record_step([float(estimate.coefficients.double().norm())], estimate.loss)
        plain = size.within_reach(BOLD * size.rate(1, len(found.losses)), 1)
        size.expected_fall = 0.5 * plain * size.signal * size.moment.mean
        moment = max(size.latest / max(1, len(estimate.coefficients)), 1e-30)
        return plain * rule_gain(self.rule, moment, 1, step)

    # -- state --------------------------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """The measurements for a log: those of ``StepSize``, and the scale α."""
        return self.size.summary() | {"scale": self.alpha}

    def state(self) -> dict[str, Any]:
        """Its state as JSON; :meth:`restore` takes it back exactly."""
        return {
            "size": self.size.state(),
            "scale": asdict(self.scale),
            "distance": self.distance.value,
            "wall": self.wall if math.isfinite(self.wall) else None,
            "max_phases": self.max_phases,
            "phases": self.phases,
            "drawn_phases": self.drawn_phases,
            "lost": self.lost,
            "rejected": self.rejected,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.size = StepSize.restored(state["size"])
        self.scale = RunningMean(**state["scale"])
        self.distance = StepDistance(float(state["distance"]))
        self.wall = math.inf if state["wall"] is None else state["wall"]
        self.max_phases, self.phases, self.drawn_phases = state["max_phases"], state["phases"], state["drawn_phases"]
        self.lost = state["lost"]
        if state["rejected"] is not None:
            self.reject(state["rejected"])
