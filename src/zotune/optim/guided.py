"""Guided turns: steps of one forward pass, in which output errors tell the derivatives and losses along them tell how far to go.

**Derivatives.** With δ_i the error at scored position i (``output_errors``) and x_i what a layer is given there, a layer that adds W x to
the hidden state has about the derivatives Σ_i (Pᵀδ_i)(Vᵀx_i)ᵀ along the numbers of S in W + P S Vᵀ: as if what it adds went to the head
as it is. They come for every example, (C, N), with the forward that gives the losses. Only those of the last layer are exact, up to the
last norm; so they are not taken at their word:

**Scale.** Along d, the direction of their mean ĝ, the losses at θ ± ρ d give the slope that the loss has indeed, and α = slope / ‖ĝ‖ is
what every derivative is multiplied by; where the loss does not fall that way α is 0, and the next turn LOZO's.

**Rate.** With the curvature h = dᵀHd of the same losses, the moment M = ‖αĝ‖² of the steps and the part s / M of it that examples agree
upon, η = 1 / (h M / s + ¼ h), twice that of coefficients along drawn directions (``step_size``): here the noise is the batch's alone. ρ is
as far as a step goes.

**Turns.** A guided one has the first, and after so many LOZO's has one; as long as a step of LOZO's promised less for its evaluations than
a guided one's did, twice as many the next time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate
from zotune.methods.rules import Rule
from zotune.objectives.output_gradients import Watch, watched
from zotune.optim.calibration.gains import rule_gain
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.signal_prior import GuessedSignal
from zotune.optim.calibration.step_size import REACH, StepSize
from zotune.optim.context import StepContext
from zotune.optim.evaluator import Evaluator
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.activation import given
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.guided import GuidedCoordinate
from zotune.weights.layouts import is_outputs_first
from zotune.weights.structure import trained_layers

#: Distance from θ, as a norm of all S, at which the first slope is measured; an S of norm 1 is a change of the size of a weight.
NEAR = 1e-2
#: How many times as far as before, or as near, a slope is measured again where a step would go elsewhere; how often, at most.
FARTHER, LOOKS = 8.0, 6
#: The steps of a turn at which slopes are measured if rates are, beside the first: powers of 2 of all steps so far, and every so many.
EVERY = 20
#: How many times as far the loss has to fall where a slope is measured farther away.
WORTH = 1.5
#: Steps much longer than the distance last looked at are looked at first.
LONGER = REACH
#: Guided turns before LOZO's first, and the most there may be between two of them.
PATIENCE, LONGEST = 16, 256
#: η as a multiple of the one for drawn directions.
BOLD = 2.0
#: The part of a told derivative's square that is taken to be signal where a batch has one loss: runs of single examples went best with it,
#: and worse where it followed what steps achieve, as that of drawn directions does.
ALONE = 0.25
#: Weight of a new measurement of α.
FORGETTING = 0.25


class Told(NamedTuple):
    """What one forward pass tells of a batch.

    Attributes:
        losses: (N,), float32 on the CPU.
        slopes: the derivative of each example's loss along every number of the guided layers' S, (C, N), not scaled yet.
        evaluated: sequences that went through the model.
    """

    losses: Tensor
    slopes: Tensor
    evaluated: int


class Guidance:
    """Takes the measurements of guided turns, and knows whose turn it is.

    Args:
        forward: evaluates the model.
        evaluator: for what its workers share.
        rule: the update rule.
        interval: steps of a turn.
        measured: whether rates are measured; else scales alone are.
    """

    def __init__(self, forward: PerturbedForward, evaluator: Evaluator, rule: Rule, interval: int, measured: bool) -> None:
        self.forward, self.evaluator, self.rule = forward, evaluator, rule
        self.interval, self.measured = interval, measured
        self.coordinates = [c for c in forward.coordinates if isinstance(c, GuidedCoordinate)]
        owned = {id(c.parameter): c for c in self.coordinates}
        self.layers = trained_layers(forward.model, owned)
        self.size = StepSize(guess=GuessedSignal(ALONE, held=False))
        self.scale = RunningMean(FORGETTING)  # α
        self.wall = math.inf  # how far a step may go, where going farther was seen to be no better
        self.patience, self.waited, self.others = PATIENCE, 0, 0  # guided turns that LOZO's wait for, have waited for; turns of LOZO's
        self.forwards = self.sequences = 0  # what the last measurement took

    @property
    def guided(self) -> list[GuidedCoordinate]:
        """The coordinates that are guided in this turn, in the order of their numbers."""
        return [c for c in self.coordinates if c.guided]

    @property
    def on(self) -> bool:
        """Whether this turn is a guided one."""
        return any(c.guided for c in self.coordinates)

    def parts(self, numbers: Tensor) -> list[tuple[GuidedCoordinate, Tensor]]:
        """What of all numbers (C,) is each guided coordinate's."""
        guided = self.guided
        return list(zip(guided, numbers.split([c.guides for c in guided]), strict=True))

    # -- whose turn it is -----------------------------------------------------------------------------------------------------------

    def next(self, plain: StepSize | None, evaluations: int) -> bool:
        """Whether the turn that begins is a guided one, if errors are told.

        Args:
            plain: what is known of LOZO's steps, where rates are measured.
            evaluations: of the batch in a step of LOZO's, to one of a guided step.
        """
        if self.on:
            self.waited += 1
            return self.waited < self.patience and self.alpha > 0
        if self.others and plain is not None:
            worth = (plain.promise or 0.0) / evaluations >= (self.size.promise or 0.0)
            self.patience = PATIENCE if worth else min(2 * self.patience, LONGEST)
        self.waited = 0
        return True

    def turned(self) -> None:
        """A turn has begun."""
        if self.on:
            self.size.fade()
        else:
            self.others += 1

    # -- derivatives ----------------------------------------------------------------------------------------------------------------

    def told(self, context: StepContext) -> Told:
        """Losses of the step's examples at θ, and what they tell."""
        guided = self.guided
        layers = {layer: coordinate for layer, coordinate in self.layers.items() if coordinate.guided}
        numbers = sum(c.guides for c in guided)
        key = Key(context.seed, context.step, 0, "", "loss")

        def rows_of(call: Callable[[], Tensor]) -> Tensor:
            @tagged("activations")
            def work() -> Tensor:
                with isolated_generators(key, self.forward.devices), watched() as watch:
                    answers = _Answers(watch, layers)
                    with given(layers, answers.look):
                        losses = call()
                return torch.cat([losses.unsqueeze(0), answers.slopes(guided, losses.numel()).to(losses.device)])

            return self.forward.evaluate(work, None)

        values, evaluated = self.evaluator.table(context, 1 + numbers, rows_of)
        values = values.cpu()
        return Told(values[0], values[1:], evaluated)

    @property
    def alpha(self) -> float:
        """α, what told derivatives are multiplied by."""
        return max(0.0, self.scale.mean) if self.scale.count else 1.0

    @tagged("activations")
    def estimate(self, told: Told) -> Estimate:
        """The derivative along every number of S as a coefficient; one that is not finite skips the step."""
        loss = float(told.losses.double().mean())
        coefficients = self.alpha * told.slopes.double().mean(dim=1)
        good = math.isfinite(loss) and bool(coefficients.isfinite().all())
        kept = coefficients.float() if good else torch.zeros(len(coefficients))
        return Estimate(loss if good else math.nan, kept, (not good,) * len(kept), math.nan, None)

    # -- how far ----------------------------------------------------------------------------------------------------------------------

    @tagged("activations")
    def measure(self, told: Told, evaluate: Callable[[], Tensor], seed: int, step: int) -> None:
        """Measure the slope and curvature along what is told, where that is due; ``evaluate`` gives the losses of the step's examples."""
        self.forwards = self.sequences = 0
        mean = told.slopes.double().mean(dim=1)
        norm = float(mean.norm())
        if not (self._due(step) and math.isfinite(norm) and norm > 0):
            return
        size, far, fall = self.size, self.size.radius or NEAR, -math.inf
        radius = min(size.stride, LONGER * far) if size.stride > 0 else far
        self.wall = math.inf
        with self._toward(mean / norm):
            for look in range(LOOKS):
                plus, minus = (self._at(evaluate, sign * radius, seed, step) for sign in (1.0, -1.0))
                slope = float((plus - minus).double().mean()) / (2 * radius)
                bend = (plus + minus - 2 * told.losses).double() / radius**2
                if not (math.isfinite(slope) and bool(bend.isfinite().all())):
                    radius, size.stride = radius / FARTHER, radius / FARTHER  # no step may go there
                    continue
                lower = float((told.losses - minus).double().mean())
                if look and radius > size.radius and lower < WORTH * fall:  # where a loss is level no curvature tells how far is far
                    self.wall = REACH * size.radius
                    break
                fall = lower
                if look:
                    self.scale = RunningMean(FORGETTING)  # what is seen where steps go is all that counts
                size.look(radius)
                size.curve(bend.unsqueeze(0))
                self.scale.add(slope / norm)
                if not self.measured or self.alpha == 0:
                    break
                self._take_in(told, self.alpha * norm)
                size.rate(1, len(told.losses))
                if radius / FARTHER <= size.stride <= FARTHER * radius:
                    break
                radius = min(max(size.stride, radius / FARTHER), FARTHER * radius)
        if self.scale.mean <= 0:
            size.promise = 0.0

    def _due(self, step: int) -> bool:
        size = self.size
        if not step % self.interval or not self.scale.count:
            return True
        if not self.measured:
            return False
        longer = min(size.stride, self.wall) > LONGER * size.radius
        return longer or not size.taken % EVERY or not size.taken & (size.taken - 1)

    def _at(self, evaluate: Callable[[], Tensor], scale: float, seed: int, step: int) -> Tensor:
        offset = Offset(scale, seed, step, 0)
        losses = self.forward.evaluate(evaluate, offset, only={c.name for c in self.guided})
        self.forwards += 1
        self.sequences += losses.numel()
        return losses.cpu()

    @contextmanager
    def _toward(self, direction: Tensor) -> Iterator[None]:
        """For the length of a block, S of all layers are evaluated along ``direction`` (C,)."""
        try:
            for coordinate, part in self.parts(direction.float()):
                coordinate.toward = part
            yield
        finally:
            for coordinate in self.coordinates:
                coordinate.toward = None

    def _take_in(self, told: Told, norm: float) -> None:
        """What is to be known before a rate: the moment of such steps."""
        if not self.size.moment.count:
            self.size.moment.add(norm**2)
            self.size.tell(self._as_one(told))
        self.size.latest = norm**2

    @tagged("activations")
    def _as_one(self, told: Told) -> Tensor:
        """Scaled derivatives of single examples, (C, N), of a size such that their mean square is that of the step's."""
        return math.sqrt(len(told.slopes)) * self.alpha * told.slopes.double()

    def rate(self, told: Told, estimate: Estimate, step: int) -> float:
        """η for a step of ``estimate``, for the update rule."""
        size, norm = self.size, float(estimate.coefficients.double().norm())
        size.tell(self._as_one(told))
        size.step([norm], estimate.loss)
        plain = size.within_reach(BOLD * size.rate(1, len(told.losses)), 1)
        size.promise = 0.5 * plain * size.signal * size.moment.mean
        number = max(size.latest / max(1, len(estimate.coefficients)), 1e-30)
        return plain * rule_gain(self.rule, number, 1, step)

    # -- state --------------------------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """The measurements for a log: those of ``StepSize``, and the scale α."""
        return self.size.summary() | {"scale": self.alpha}

    def state(self) -> dict[str, Any]:
        """Plain data; :meth:`restore` takes it back exactly."""
        return {
            "size": self.size.state(),
            "scale": asdict(self.scale),
            "wall": self.wall if math.isfinite(self.wall) else None,
            "patience": self.patience,
            "waited": self.waited,
            "others": self.others,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.size = StepSize.restored(state["size"])
        self.scale = RunningMean(**state["scale"])
        self.wall = math.inf if state["wall"] is None else state["wall"]
        self.patience, self.waited, self.others = state["patience"], state["waited"], state["others"]


class _Answers:
    """Vᵀx at the scored positions, for every guided layer, while losses are computed."""

    def __init__(self, watch: Watch, layers: dict[nn.Module, GuidedCoordinate]) -> None:
        self.watch, self.layers = watch, layers
        self.found: dict[str, list[Tensor]] = {}
        self.first: dict[str, bool] = {c.name: is_outputs_first(layer) for layer, c in layers.items()}

    @tagged("activations")
    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        coordinate = self.layers[module]
        rows = self.watch.rows_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if rows is not None:
            inwards = coordinate.v if self.first[coordinate.name] else coordinate.p
            self.found.setdefault(coordinate.name, []).append(rows.float() @ inwards.to(rows.device))

    @tagged("activations")
    def slopes(self, coordinates: Sequence[GuidedCoordinate], examples: int) -> Tensor:
        """Derivatives of the losses of so many examples along every number of S, (C, examples); 0 for a layer that was not seen."""
        tables = []
        errors = torch.cat(self.watch.errors) if self.watch.errors else torch.zeros(0, 1)
        texts = torch.cat(self.watch.texts) if self.watch.texts else torch.zeros(0, dtype=torch.long)
        owners = texts * examples // max(1, self.watch.number)  # a loss of one number for several texts is the mean of theirs
        share = examples / max(1, self.watch.number)
        for coordinate in coordinates:
            table = torch.zeros(examples, coordinate.guides, device=errors.device)
            rows = torch.cat(self.found[coordinate.name]) if coordinate.name in self.found else None
            if rows is not None and len(rows) == len(errors):
                first = self.first[coordinate.name]
                outwards = errors @ (coordinate.p if first else coordinate.v).to(errors.device)
                rows = rows.to(errors.device)
                left, right = (outwards, rows) if first else (rows, outwards)
                products = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
                table.index_add_(0, owners, products, alpha=share)
            tables.append(table.T)
        return torch.cat(tables)
