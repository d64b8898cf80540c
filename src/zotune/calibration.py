"""ε and η from the loss itself: what ``eps="auto"`` and ``lr="auto"`` do, in forward passes only.

**ε.** Along a few directions the coefficients are measured at a ladder of ε. Below the right range they are rounding noise, above it they
bend with the loss; in between neighbours agree. The largest ε that still agrees with its neighbour is taken.

**η.** For a step θ ← θ − η ĝ with K directions the loss changes on average by

    −η s + ½ η² M h / K,      s = ‖∇L‖²,   M = E[c²],   h = E[ZᵀHZ] = tr H

which is least at K s / (M h). All three are measurable: h from L(θ + εZ) + L(θ − εZ) − 2 L(θ); M from every step's coefficients, the noise
of the batch included; s from how far the examples of a batch agree along one direction. Many directions take away the noise, not the
curvature along the gradient itself, which is at most ‖H‖_F = √(Var[ZᵀHZ] / 2); so

    η = 1 / (M h / (K s) + ‖H‖_F).

The measurements are made on the first batch, after 1, 2, 4, ... steps, and every :data:`INTERVAL` steps, since curvature grows and
signal falls while a model learns. A loss that rises all the same halves the rate.

How weak the signal of a batch may be is the one thing few forwards cannot tell: near the end of a run the examples' gradients are hundreds
of times larger than their mean, and a batch shows noise only. Then K s / M is taken to be the number of examples whose noise a
step averages, N or K n / M if that is more (n: the mean square of single examples' coefficients), over :data:`NOISE_SCALE`: a batch of so
many examples, the "simple noise scale", is where their mean stands out (1812.06162).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from zotune.coordinates import Offset
from zotune.estimators import ESTIMATORS, Estimator
from zotune.evaluating import NonFiniteLossError
from zotune.methods.method import Method
from zotune.probe import Probe
from zotune.rules import EMASGD, Rule, Sign
from zotune.shaping import FITNESS

#: The values of ε that are tried; where climbing begins, and in well-behaved single precision goes on from.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RUNG = 2
#: Directions that the ladder is measured along, and those that the first learning rate is made of.
LADDER_DIRECTIONS, FIRST_DIRECTIONS = 2, 8
#: Steps between two measurements, each three evaluations of the batch, once the first steps are over.
INTERVAL = 20
#: Number of the first direction that measurements use, beyond those of any step.
DIRECTION = 1 << 24
#: Relative error of the coefficients that a larger ε may bring: small beside that of a random direction, which is 100%.
TOLERANCE = 0.03
#: Examples whose mean gradient is as large as its noise, if a batch shows no signal.
NOISE_SCALE = 300.0
#: What a rising loss multiplies η by, and what every measurement since then multiplies it by until it is back.
BRAKE, RELEASE = 0.5, 1.1
#: Weight of a new measurement in the running means, once there are enough of them.
FORGETTING = 0.1
#: The same for curvature, which may fall tenfold within a few steps of a new task.
FORGETTING_CURVATURE = 0.25

#: Losses of the batch at θ + scale · Z_direction, (n,).
At = Callable[[float, int], Tensor]


def choose_eps(at: At, estimator: Estimator) -> float:
    """The largest ε of :data:`LADDER` at which coefficients do not depend on ε.

    Args:
        at: losses at a point; scale 0 is θ itself.
        estimator: whose coefficients count.

    Raises:
        NonFiniteLossError: losses on the ladder are not finite.
    """
    here = at(0.0, DIRECTION).double()
    low, high = min(estimator.signs), max(estimator.signs)

    @functools.cache
    def coefficients(rung: int) -> Tensor:
        eps, columns = LADDER[rung], []
        for k in range(LADDER_DIRECTIONS):
            plus, minus = (here if sign == 0 else at(sign * eps, DIRECTION + k).double() for sign in (high, low))
            columns.append((plus - minus) / (eps * (high - low)))
        return torch.cat(columns)

    @functools.cache
    def distance(rung: int) -> float:
        """Between a rung and the next."""
        return _distance(coefficients(rung), coefficients(rung + 1))

    steps = range(len(LADDER) - 1)
    best = FIRST_RUNG if distance(FIRST_RUNG) <= TOLERANCE else min(steps, key=distance)
    if not math.isfinite(distance(best)):
        if all(bool(coefficients(rung).isfinite().all()) for rung in range(len(LADDER))):
            return LADDER[-1]  # a loss that does not move, or by rounding only
        raise NonFiniteLossError(
            "the loss is not finite near the model's weights, so no eps can be chosen; look at the model and the first batch."
        )
    rung = best
    while rung in steps and distance(rung) <= max(TOLERANCE, 2 * distance(best)):
        rung += 1
    return LADDER[rung]


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ over the root of ‖a‖ ‖b‖; infinite where that says nothing."""
    size = float((a.norm() * b.norm()).sqrt())
    distance = float((a - b).norm()) / size if size > 0 else math.inf
    return distance if math.isfinite(distance) else math.inf


@dataclass
class RunningMean:
    """A mean that forgets: each new number weighs 1 / count, but never below ``forgetting``. Keeps the variance of the mean too."""

    forgetting: float = FORGETTING
    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    def add(self, number: float) -> None:
        if not math.isfinite(number):
            return
        self.count += 1
        weight = max(1 / self.count, self.forgetting)
        self.mean += weight * (number - self.mean)
        self.square += weight * (number * number - self.square)

    @property
    def variance(self) -> float:
        return max(0.0, self.square - self.mean**2)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        effective = min(self.count, 2 / self.forgetting - 1)
        return math.sqrt(self.variance / max(1.0, effective - 1))


@dataclass
class StepSize:
    """The learning rate as a function of what has been measured.

    Attributes:
        curvature: h.
        signal: s, from pairs of examples under the same direction.
        single: n, the mean square of single examples' coefficients.
        moment: M of the steps.
        brake: factor that a rising loss has taken the rate back by.
    """

    curvature: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING_CURVATURE))
    signal: RunningMean = field(default_factory=lambda: RunningMean(FORGETTING / 2))
    single: RunningMean = field(default_factory=RunningMean)
    moment: RunningMean = field(default_factory=RunningMean)
    recent: RunningMean = field(default_factory=lambda: RunningMean(2 * FORGETTING))
    lowest: float | None = None
    brake: float = 1.0

    def measure(self, here: Tensor, plus: Tensor, minus: Tensor, eps: float, parts: int | None = None) -> Tensor:
        """Take in the losses of a batch at θ and θ ± εZ, (n,) each; returns the coefficients along Z of its examples, or ``parts``."""
        second = float((plus.double() + minus.double() - 2 * here.double()).mean()) / eps**2
        each = (plus.double() - minus.double()) / (2 * eps)
        self.curvature.add(second)
        self.brake = min(1.0, RELEASE * self.brake)
        self.single.add(float(each.square().mean()))
        if parts is not None:
            each = torch.stack([part.mean() for part in each.tensor_split(parts)])
        n = each.numel()
        if n > 1:
            self.signal.add(float(each.sum() ** 2 - each.square().sum()) / (n * (n - 1)))
        return each

    def step(self, coefficients: Sequence[float], loss: float) -> None:
        """Take in a step's coefficients and loss."""
        kept = [c for c in coefficients if c]
        if kept:
            self.moment.add(sum(c * c for c in kept) / len(kept))
        if not math.isfinite(loss):
            self.brake *= BRAKE
            return
        self.recent.add(loss)
        if self.recent.count < 1 / self.recent.forgetting:
            return
        self.lowest = self.recent.mean if self.lowest is None else min(self.lowest, self.recent.mean)
        if self.recent.mean > self.lowest + 0.1 * abs(self.lowest) + 3 * self.recent.error:
            self.brake *= BRAKE
            self.recent = RunningMean(self.recent.forgetting)  # see first what the lower rate does
            self.lowest = None

    def rate(self, directions: int, examples: int) -> float:
        """η for steps of K directions on N examples, for plain SGD on coordinates of unit scale; 0 before there is anything to go by.

        An example that has several directions of its own counts as often.
        """
        moment, curvature = self.moment.mean, self.curvature
        # A saddle's directions cancel, but their sizes say how far is far.
        mean = max(curvature.mean + curvature.error, 0.2 * math.sqrt(curvature.square))
        if not (moment > 0 and mean > 0):
            return 0.0
        # A loss that does not tell its examples apart hides how noisy it is.
        certain = (self.signal.mean - self.signal.error) / moment if self.signal.count else 0.25
        alone = max(
            directions * self.single.mean / moment, float(examples)
        )  # so many examples' noise is averaged out, as far as can be seen
        gain = min(float(directions), max(directions * certain, alone / NOISE_SCALE))
        return self.brake / (mean / gain + math.sqrt(curvature.variance / 2))

    def summary(self) -> dict[str, float]:
        """The measurements for a log: curvature h, signal s, second moment M, brake."""
        means = {"curvature": self.curvature, "signal": self.signal, "moment": self.moment}
        return {**{name: mean.mean for name, mean in means.items()}, "brake": self.brake}

    def state(self) -> dict[str, Any]:
        """Plain data; :meth:`restored` takes it back exactly."""
        return asdict(self)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> StepSize:
        means = {name: RunningMean(**value) for name, value in state.items() if isinstance(value, dict)}
        return cls(**{**state, **means})


def rule_gain(rule: Rule, moment: float, directions: int, step: int = 1 << 20) -> float:
    """What to multiply plain SGD's η by for another rule: 1 − β under momentum; Adam's step is η whatever the size of ĝ.

    RMSprop's does not either, once its average, which starts at 0, has taken in enough of the ``step`` steps so far. The sign of ĝ moves
    every number by η too, and for a noisy ĝ, whose numbers are normal with the variance M/K, has the mean √(2/π) ∇ over their standard
    deviation.

    Raises:
        ValueError: a rule of which that is not known.
    """
    names = {cls.__name__ for cls in rule.cls.__mro__}
    if rule.cls is EMASGD:
        return 1.0
    if rule.cls is torch.optim.SGD:
        return (1 - rule.options.get("momentum", 0.0)) / (1 - rule.options.get("dampening", 0.0))
    if names & {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}:
        return math.sqrt(moment / directions)
    if rule.cls is torch.optim.RMSprop:
        return math.sqrt(moment / directions * (1 - rule.options.get("alpha", 0.99) ** (step + 1)))
    if rule.cls is Sign:
        return math.sqrt(2 / math.pi * moment / directions)
    raise ValueError(
        f"learning rate 'auto' is not known for the update rule {rule.cls.__name__}; give a number, or use a method on SGD or Adam."
    )


def gain(method: Method, rule: Rule, moment: float, directions: int, eps: float, step: int = 1 << 20) -> float:
    """What to multiply plain SGD's η by in a method's step number ``step``, of coefficients with the mean square ``moment``, K directions.

    Raises:
        ValueError: its update rule is one of which that is not known.
    """
    if method.anchoring is not None:
        raise ValueError(f"learning rate 'auto' is not known for {method.name}, which has two; give a number.")
    if method.replayed is not None:
        return method.replayed.gain(moment, directions)
    fitness = FITNESS[method.fitness]
    if fitness is not None or method.shaping is not None:  # from here on M is that of other coefficients, 1 or so
        scale = fitness.gain(moment) if fitness is not None else 1.0
        scale *= method.shaping.gain(moment, directions, eps) if method.shaping is not None else 1.0
        return scale * rule_gain(rule, 1.0, 1, step)
    return rule_gain(rule, moment, directions, step)


def measurable(method: Method) -> bool:
    """Whether ``lr="auto"`` is known for a method."""
    try:
        gain(method, Rule(method.rule, method.rule_args), 1.0, 1, 1.0)
    except ValueError:
        return False
    return True


class Calibrator:
    """Makes the measurements of a run, and knows what has come of them.

    Args:
        probe: evaluates the model.
        method, rule: what is calibrated.
        lr_scale: what low-rank coordinates multiply a learning rate by.
        chooses_eps, chooses_lr: what is to be chosen.

    Raises:
        ValueError: a learning rate is to be chosen for a rule of which no scale is known.
    """

    def __init__(self, probe: Probe, method: Method, rule: Rule, lr_scale: float, chooses_eps: bool, chooses_lr: bool) -> None:
        if chooses_lr:
            gain(method, rule, 1.0, 1, 1.0)
        self.probe, self.method, self.rule, self.lr_scale = probe, method, rule, lr_scale
        self.estimator = ESTIMATORS[method.estimator]
        self.chooses_eps, self.chooses_lr = chooses_eps, chooses_lr
        self.step_size = StepSize()
        self.forwards = self.sequences = 0  # evaluations of the batch, and of examples, that the last call made

    def eps(self, evaluate: Callable[[], Tensor], seed: int, step: int) -> float:
        """ε for the run, of the losses that ``evaluate`` gives on its first batch."""
        self.forwards = self.sequences = 0
        found = choose_eps(self._at(evaluate, seed, step), self.estimator)
        self.probe.forget_directions()
        return found

    def measure(self, evaluate: Callable[[], Tensor], eps: float, seed: int, step: int) -> None:
        """Measure what a learning rate is made of, where that is due."""
        self.forwards = self.sequences = 0
        if not self.chooses_lr or (step % INTERVAL and step & (step - 1)):
            return
        at, first = self._at(evaluate, seed, step), not self.step_size.curvature.count
        here = at(0.0, DIRECTION)
        parts = self.method.parts(len(here)) if self.method.own else None
        for k in range(FIRST_DIRECTIONS if first else 1):
            each = self.step_size.measure(here, at(eps, DIRECTION + k), at(-eps, DIRECTION + k), eps, parts)
            if first:
                self.step_size.moment.add(float(each.square().mean()) if self.method.own else float(each.mean()) ** 2)
        self.probe.forget_directions()

    def rate(self, directions: int, examples: int, eps: float, step: int) -> float:
        """η for step ``step``, of K directions on N examples."""
        plain = self.step_size.rate(directions, examples)
        return plain * gain(self.method, self.rule, self.step_size.moment.mean, directions, eps, step) / self.lr_scale

    def _at(self, evaluate: Callable[[], Tensor], seed: int, step: int) -> At:
        def at(scale: float, direction: int) -> Tensor:
            losses = self.probe.evaluate(evaluate, Offset(scale, seed, step, direction))
            self.forwards += 1
            self.sequences += losses.numel()
            return losses

        return at
