"""The learning rate as a function of what forward passes have measured.

For a step θ ← θ − η ĝ with K directions the loss changes on average by

    −η s + ½ η² M h / K,      s = ‖∇L‖²,   M = E[c²],   h = E[ZᵀHZ] = tr H

which is least at K s / (M h). All three are measurable: h from L(θ + εZ) + L(θ − εZ) − 2 L(θ); M from every step's coefficients, the noise
of the batch included; s / M from how far the examples of a batch agree along one direction. Many directions take away the noise, not the
curvature along the gradient itself, which is at most ‖H‖_F = √(Var[ZᵀHZ] / 2); so

    η = ½ / (M h / (K s) + ‖H‖_F),

the ½ because without it η is best for one step, but what the step's noise adds to the sharp directions costs the next ones too.

Few forwards cannot show how weak the signal of a batch is: near the end of a run the examples' gradients are many times larger than their
mean, and a batch shows noise only. Then K s / M is taken to be the number of examples whose noise a
step averages, N or K n / M if that is more (n: the mean square of single examples' coefficients), over :data:`NOISE_SCALE`: a batch of so
many examples, the "simple noise scale", is where their mean stands out (1812.06162).

A batch of one loss, of one example or a mean, does not show s / M. It is guessed then (see ``signal_prior``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.signal_prior import GuessedSignal

#: Examples whose mean gradient is as large as its noise, if a batch shows no signal.
NOISE_SCALE = 100.0
#: Part of the rate best for one step that is best for many.
CAUTION = 0.5
#: The factor of η after a rising loss, and the factor of every later measurement until η is restored.
BRAKE, RELEASE = 0.5, 1.1
#: Weight of a new measurement in the running means.
FORGETTING = 0.1
#: The same for curvature, which may fall tenfold within a few steps of a new task.
FORGETTING_CURVATURE = 0.25
#: The same for the agreement of examples.
FORGETTING_AGREEMENT = 0.15
#: ‖H‖_F is never taken to be less than this part of the trace: few directions may miss the sharp ones.
LEAST_NORM = 0.25
#: Standard errors above 0 at which a curvature is not a saddle's.
SADDLE_ERRORS = 3.0
#: Factor of the distance from θ at which earlier curvatures are discarded.
WIDER = 4.0
#: Multiples of the distance at which curvature was sampled: how far a step may go, and may want to go before a new sample.
REACH, LEAP = 2.0, 3.0
#: Units of examples that are compared under a shared direction, at most.
UNITS = 4


@dataclass
class StepSize:
    """The learning rate as a function of what has been measured.

    Attributes:
        curvature: h.
        spread: E[(ZᵀHZ)²], of halves of the examples under one direction, whose noise is not the same.
        agreement: κ, what units of examples have in common in their coefficients along one direction (see :func:`agreement`).
        single: n, the mean square of single examples' coefficients.
        moment: M of the steps.
        guess: s / M, as long as no agreement could be seen.
        units: units of examples, as agreement compares them, that make a coefficient of a step together, U.
        few: whether agreement is seen in measurements only, because steps have directions of examples' own.
        latest: the mean square of the last step's coefficients.
        shaped: the mean square of the coefficients that a fitness makes of theirs.
        leapt: whether the last step would have gone much farther than curvature was sampled.
        brake: factor that a rising loss has taken the rate back by.
        radius: distance from θ at which curvature has been measured last, 0 before.
        stride: how far a step goes, as a multiple of a direction's length: η √(M / K), 0 before one is known.
        expected_fall: by how much the last step was expected to lower the loss, ½ η s.
        waited: phases of another kind since.
        taken: steps of its own.
    """

    curvature: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING_CURVATURE))
    spread: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING_CURVATURE))
    agreement: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING_AGREEMENT))
    single: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING))
    moment: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING))
    recent: RunningMean = field(default_factory=lambda: RunningMean(2 * FORGETTING))
    guess: GuessedSignal = field(default_factory=GuessedSignal)
    shaped: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING))
    units: int = 1
    few: bool = False
    latest: float = 0.0
    leapt: bool = False
    lowest: float | None = None
    brake: float = 1.0
    radius: float = 0.0
    stride: float = 0.0
    expected_fall: float | None = None
    waited: int = 0
    taken: int = 0

    def fade(self) -> None:
        """Lower the weight of earlier measurements, since steps of another kind have changed the model."""
        for mean in (self.curvature, self.spread, self.agreement, self.single, self.moment):
            mean.count = min(mean.count, 3)
        if self.waited:
            self.guess.reset()
        self.recent, self.lowest, self.waited = RunningMean(2 * FORGETTING), None, 0

    def sample_at(self, radius: float) -> bool:
        """Whether the next measurements, at ``radius``, begin anew: measurements much nearer say little about it."""
        anew = not self.curvature.count or radius > WIDER * self.radius
        if anew:
            self.curvature, self.spread = RunningMean(FORGETTING_CURVATURE), RunningMean(FORGETTING_CURVATURE)
        self.radius, self.leapt = radius, False
        return anew

    @tagged("activations")
    def record_losses(self, losses: Tensor, radius: float, owners: Tensor | None = None) -> None:
        """Record the losses (3, n) of a batch at θ and θ ± radius · Z, Z the same for all examples or each its owner's, (n,)."""
        here, plus, minus = losses.double()
        self.record_curvature((plus + minus - 2 * here).unsqueeze(0) / radius**2, owners)
        each = (plus - minus).unsqueeze(0) / (2 * radius)
        if owners is None:
            self.record_examples(each)
        else:
            self.single.add(float(each.square().mean()))

    @tagged("activations")
    def record_curvature(self, each: Tensor, owners: Tensor | None = None) -> None:
        """Record ZᵀHZ of single examples, (1, n)."""
        self.curvature.add(float(each.mean()))
        if owners is None:
            self.spread.add(float(each.mean()) ** 2)
        else:
            halves = in_units(each, owners)
            self.spread.add(float(halves.prod(dim=1).mean() if halves.shape[1] > 1 else each.square().mean()))
        self.brake = min(1.0, RELEASE * self.brake)

    @tagged("activations")
    def record_examples(self, each: Tensor) -> None:
        """Record coefficients of single examples, (K, n), under directions that they share."""
        if not bool(each.isfinite().all()):
            return
        self.single.add(float(each.square().mean()))
        units = in_units(each)
        self.units = units.shape[1]
        self.compare(units)

    def compare(self, *tables: Tensor, samples: int = 1) -> None:
        """Record coefficients of units of examples; tables (m, U), U units under one direction, count by their pairs."""
        found = [(table.shape[0] * math.comb(table.shape[1], 2), agreement(table)) for table in tables]
        seen = [(pairs, kappa) for pairs, kappa in found if kappa is not None and math.isfinite(kappa)]
        if seen:
            mean = sum(pairs * kappa for pairs, kappa in seen) / sum(pairs for pairs, _ in seen)
            for _ in range(samples):
                self.agreement.add(mean)

    def record_step(self, coefficients: Sequence[float], loss: float) -> None:
        """Record a step's coefficients and loss."""
        self.taken += 1
        kept = [c for c in coefficients if c]
        if kept:
            self.latest = sum(c * c for c in kept) / len(kept)
            self.moment.add(self.latest)
        if not math.isfinite(loss):
            self.brake *= BRAKE
            return
        if not self.agreement.count:
            self.guess.record(loss)
        self.recent.add(loss)
        if self.recent.count < 1 / self.recent.forgetting:
            return
        self.lowest = self.recent.mean if self.lowest is None else min(self.lowest, self.recent.mean)
        if self.recent.mean > self.lowest + 0.1 * abs(self.lowest) + 3 * self.recent.error:
            self.brake *= BRAKE
            self.recent = RunningMean(self.recent.forgetting)  # see first what the lower rate does
            self.lowest = None

    def record_fitness(self, coefficients: Sequence[float], shaped: Sequence[float]) -> None:
        """Record what a fitness makes of a step's coefficients."""
        kept = [s for c, s in zip(coefficients, shaped, strict=True) if c]
        if kept:
            self.shaped.add(sum(s * s for s in kept) / len(kept))

    def expect(self, factor: float) -> None:
        """Record that the expected step is taken, its rate multiplied by ``factor``."""
        self.guess.expect(factor * (self.expected_fall or 0.0))

    @property
    def signal(self) -> float:
        """s / M: the part of a coefficient's mean square that is signal, as far as can be seen."""
        if not self.agreement.count:
            return self.guess.signal
        mean, error = self.agreement.mean, self.agreement.error
        # With a sample every step, a lower bound. With few, a bound would be 0 for most of a run: then the mean, less what chance is likely
        # to have added to it.
        kappa = min(1.0, mean - (error**2 / mean if self.few else error)) if mean > error else 0.0
        return kappa * self.units / (1 + kappa * (self.units - 1))

    def rate(self, directions: int, examples: int) -> float:
        """η for steps of K directions on N examples, for plain SGD on coordinates of unit scale; 0 before there is anything to go by.

        An example that has several directions of its own counts as often.
        """
        moment, curvature = self.moment.mean, self.curvature
        # A saddle's directions cancel, but their sizes say how far is far.
        mean = max(curvature.mean + curvature.error, 0.2 * math.sqrt(max(0.0, self.spread.mean)))
        if mean <= 0:
            mean = math.sqrt(curvature.square)
        if not (moment > 0 and mean > 0):
            return 0.0
        # A loss over examples that cannot be told apart hides its noise: the noise of so many is averaged out.
        alone = max(directions * self.single.mean / moment, float(examples))
        gain = min(float(directions), max(directions * self.signal, alone / NOISE_SCALE))
        spread = self.spread.mean
        if self.few and curvature.mean < SADDLE_ERRORS * curvature.error:  # a saddle: products of few halves may be negative
            spread += self.spread.error
        norm = max(math.sqrt(max(0.0, spread - curvature.mean**2) / 2), LEAST_NORM * mean)
        rate = self.brake * CAUTION / (mean / gain + norm)
        self.stride = rate * math.sqrt(moment / directions)
        return rate

    def within_reach(self, rate: float, directions: int) -> float:
        """``rate``, or what takes the step of the last coefficients no farther than ``REACH`` times where curvature was sampled.

        Gradients of an adapter whose B leaves 0, or at a cliff's edge, grow within a few steps; no running mean follows them.
        """
        length = rate * math.sqrt(self.latest / directions)
        self.leapt = 0 < LEAP * self.radius < length
        return rate * REACH * self.radius / length if 0 < REACH * self.radius < length else rate

    def summary(self) -> dict[str, float]:
        """The measurements for a log: curvature h, the signal's part s / M, second moment M, brake."""
        return {"curvature": self.curvature.mean, "signal": self.signal, "moment": self.moment.mean, "brake": self.brake}

    def state(self) -> dict[str, Any]:
        """Its state as JSON; :meth:`restored` takes it back exactly."""
        found = asdict(self)
        return found if self.shaped.count else {name: value for name, value in found.items() if name != "shaped"}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> StepSize:
        guess = GuessedSignal.restored(state["guess"])
        means = {name: RunningMean(**value) for name, value in state.items() if isinstance(value, dict) and name != "guess"}
        return cls(**{**state, **means, "guess": guess})


def in_units(each: Tensor, owners: Tensor | None = None, number: int = UNITS) -> Tensor:
    """Means (m, U) over units of neighboring examples, of numbers (K, n), or (1, n) with a direction that owns each.

    A shared direction's examples make ``number`` units, an owner's two, where there are as many. Neighbors, because an order by class
    puts one of each class side by side: single examples of different classes would disagree where their sum does not.
    """
    if owners is None:
        return torch.stack([unit.mean(dim=1) for unit in each.tensor_split(min(number, each.shape[1]), dim=1)], dim=1)
    number = int(owners.max()) + 1
    sizes = torch.bincount(owners, minlength=number)
    units = 2 if int(sizes.min()) > 1 else 1
    order = owners.argsort(stable=True)
    place = torch.empty_like(owners)
    place[order] = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    unit = owners * units + place * units // sizes[owners]
    sums = each.new_zeros(number * units).index_add_(0, unit, each[0])
    return (sums / torch.bincount(unit, minlength=number * units)).view(number, units)


def agreement(units: Tensor) -> float | None:
    """κ, the correlation of units' coefficients under one direction, from those of m directions, (m, U); None where none can be seen.

    κ = Σ over pairs of units c c′ / ((U − 1) Σ c²), 0 where units have nothing in common and 1 where they are the same. It has no unit and
    is bounded, so that its mean over steps follows a loss whose gradients shrink a hundredfold.
    """
    m, u = units.shape
    squares = float(units.square().sum())
    if u < 2 or not squares > 0:
        return None
    products = float(units.sum(dim=1).square().sum()) - squares
    return products / ((u - 1) * squares) * (1 + 2 / (m * u))  # a ratio of so few numbers is small by that
