"""ε and η from the loss itself: ``eps="auto"`` (see ``eps``) and ``lr="auto"``, by forward passes only.

Curvature and signal (see ``step_size``) are measured on the first batch, after 1, 2, 4, ... steps, and every :data:`INTERVAL` steps, since
curvature grows and signal falls during training. Curvature is measured as far from θ as a step goes: an adapter's B = 0 is a saddle with
walls around it, and a loss that is flat within ε may be anything there. A step's own losses are recorded too. Where examples have
directions of their own they show little, so the agreement of groups is measured under shared directions. A loss that rises halves η.

Rewards of generated texts have no curvature to see: they are levels with steps between them, averaged by the directions over a distance
of about ε. Their η makes every step :data:`STRIDE` · ε long, along each weight, whatever the rewards' unit; it takes no evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zotune.forward.batches import PARTS_PER_DIRECTION
from zotune.forward.losses import Losses
from zotune.forward.model import PerturbedForward
from zotune.io.memory_tags import tagged
from zotune.methods.coefficients import SQUARE, Fitness, State
from zotune.methods.estimators import ESTIMATORS, Estimate
from zotune.methods.method import Method
from zotune.methods.rules import Rule
from zotune.optim.calibration.eps import DIRECTION, FIRST_DIRECTIONS, At, choose_eps, choose_reach
from zotune.optim.calibration.gains import gain
from zotune.optim.calibration.step_size import WIDER, StepSize, in_units
from zotune.subspaces import Guided
from zotune.subspaces.coordinate import Offset

#: Draws for the first batch, where groups of examples have directions of their own.
FIRST_DRAWS = 4
#: The same at the start of a later phase.
FADED_DRAWS = 3
#: Steps between two measurements, each three evaluations of the batch, once the first steps are over.
INTERVAL = 20
#: Number of the first step whose own directions measurements use, beyond those of any run and of ``layer_scales``.
STEP = 1 << 50

#: The largest distance from θ at which curvature is measured; how many times as far as before a measurement is repeated, and how often,
#: at most: losses far from θ are bad and level, and the walls between are what counts.
WIDEST, FARTHER, MAX_SAMPLES = 1.0, 10.0, 6

#: Length of a step on rewards of generated texts, as a multiple of ε: of 0.3 and 0.6 what learned more in runs of few steps.
STRIDE = 0.6

#: How many times as far as curvature was last measured a step may go before it is measured again.
LONGER = 2.0

#: Losses (3, n) at θ and θ ± radius · Z of a draw, and the direction that owns each example, if any has one of its own.
Sample = Callable[[int, float], tuple[Tensor, Tensor | None]]
#: Losses at θ and θ ± scale · εZ, under the directions of a step.
Around = Callable[[int, float], Losses]


class Calibrator:
    """Makes the measurements of a run, and holds the results.

    Args:
        forward: evaluates the model.
        method, rule: what is calibrated.
        lr_scale: the factor of low-rank coordinates' learning rate.
        chooses_eps, chooses_lr: what is measured.

    Raises:
        ValueError: the learning rate of this method cannot be measured.
    """

    def __init__(self, forward: PerturbedForward, method: Method, rule: Rule, lr_scale: float, chooses_eps: bool, chooses_lr: bool) -> None:
        if chooses_lr:
            gain(method, rule, 1.0, 1, 1.0)
        self.forward, self.method, self.rule, self.lr_scale = forward, method, rule, lr_scale
        self.estimator = ESTIMATORS[method.estimator]
        self.chooses_eps, self.chooses_lr = chooses_eps, chooses_lr
        #: Steps of a phase, where phases alternate (see ``output_gradient_steps``).
        self.interval = method.subspace.interval if isinstance(method.subspace, Guided) else None
        self.step_size = StepSize(few=method.own)
        self.generates = False  # whether losses are those of generated texts
        self.forwards = self.sequences = 0  # evaluations of the batch, and of examples, that the last call made

    def state(self) -> dict[str, Any]:
        """Its state as JSON; :meth:`restore` takes it back exactly."""
        return self.step_size.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.step_size = StepSize.restored(state)

    def eps(self, evaluate: Callable[[], Tensor], seed: int, step: int) -> float:
        """ε for the run; ``evaluate`` returns the losses of its first batch, smooth ones where texts are generated."""
        self.forwards = self.sequences = 0
        at = self._at(evaluate, seed, step)
        found = choose_reach(at) if self.generates else choose_eps(at, self.estimator)
        self.forward.drop_directions()
        return found

    @tagged("activations")
    def measure(
        self, evaluate: Callable[[], Tensor], around: Around | None, eps: float, seed: int, step: int, *, may_fail: bool = False
    ) -> None:
        """Measure curvature and signal, where that is due.

        Args:
            evaluate: losses of the step's examples at the model's weights.
            around: for methods with own directions, losses at θ and θ ± scale · εZ under the directions of a step of the given number.
            may_fail: whether a loss of NaN is a failed reward, which counts for nothing.
        """
        self.forwards = self.sequences = 0
        if self.generates or not (self.chooses_lr and self._due(step)):
            return
        at = self._at(evaluate, seed, step)
        here = at(0.0, DIRECTION) if around is None else None

        def sample(draw: int, radius: float) -> tuple[Tensor, Tensor | None]:
            """Losses (3, n) at θ and θ ± radius · Z, and whose direction Z is."""
            if here is not None:
                found = torch.stack([here, at(radius, DIRECTION + draw), at(-radius, DIRECTION + draw)]).cpu()
                return Losses(found, None, 1, 0).without_failed().values if may_fail else found, None
            assert around is not None
            losses = around(STEP + step * FIRST_DRAWS + draw, radius / eps)
            self.forwards += 3
            self.sequences += losses.evaluated
            return _completed(losses.values.cpu()) if may_fail else losses.values.cpu(), losses.owners

        radius = max(eps, min(self.step_size.stride, WIDEST, FARTHER * self.step_size.radius))
        for _ in range(MAX_SAMPLES):
            if not self._sample(sample, at, radius, eps):
                break
            radius = min(self.step_size.stride, WIDEST, FARTHER * radius)
        self.forward.drop_directions()

    def _due(self, step: int) -> bool:
        """At steps 0, 1, 2, 4, ..., every :data:`INTERVAL`, and when steps are much longer than the distance last sampled.

        Also when a phase begins; only steps along drawn directions count.
        """
        size = self.step_size
        if self.interval is not None:
            if not step % self.interval:
                return True
            step = size.taken  # sampled as often as at the beginning of a run
        return not step % INTERVAL or not step & (step - 1) or size.leapt or min(size.stride, WIDEST) > LONGER * size.radius

    def _sample(self, sample: Sample, at: At, radius: float, eps: float) -> bool:
        """Measure at ``radius``; whether the resulting steps go so much farther that they have to be measured there."""
        size = self.step_size
        draws = 1
        if size.waited:
            size.fade()
            draws = FADED_DRAWS
        first, anew = not size.moment.count, size.sample_at(radius)
        if anew:
            draws = FIRST_DRAWS if self.method.own else FIRST_DIRECTIONS
        own, shared = [], []
        for draw in range(draws):
            losses, owners = sample(draw, radius)
            if not bool(losses.isfinite().all()):
                size.stride = radius / WIDER  # no step may go there
                return True
            size.record_losses(losses, radius, owners)
            slopes = (losses[1:2] - losses[2:]).double() / (2 * radius)
            units = slopes.mean(dim=1, keepdim=True) if owners is None else in_units(slopes, owners)
            if first:
                size.moment.add(float(units.square().mean()))
            if owners is not None:
                own.append(units)
                shared.append(self._shared(at, losses[0], DIRECTION + draw, eps))
        if own:
            size.units = 1
            size.compare(torch.cat(own), torch.cat(shared), samples=draws)
        each = self.method.num_directions
        number = each if owners is None else each * PARTS_PER_DIRECTION * (int(owners.max()) + 1)
        size.rate(number, losses.shape[1] * (1 if owners is None else each))
        return size.stride > WIDER * radius and radius < WIDEST

    def _shared(self, at: At, here: Tensor, direction: int, eps: float) -> Tensor:
        """Coefficients (1, U) of a batch's groups under one direction for all of them.

        They show how far groups agree; under directions of their own only neighbors can be compared.
        """
        low, high = min(self.estimator.signs), max(self.estimator.signs)
        plus, minus = (at(sign * eps, direction).cpu() if sign else here for sign in (high, low))
        slopes = _completed((plus - minus).double().unsqueeze(0) / (eps * (high - low)))
        return in_units(slopes, number=max(2, self.method.parts(len(here))))

    def record(self, losses: Losses, estimate: Estimate, eps: float) -> None:
        """Record a step's losses and estimate."""
        if losses.owners is None:
            self.step_size.record_examples(self.estimator.singles(losses.values.cpu(), eps, losses.num_directions))
        coefficients = estimate.coefficients.tolist()
        self.step_size.record_step(coefficients, estimate.loss)
        for fitness in self.method.transforms:
            if isinstance(fitness, Fitness):
                values = losses.values.cpu()
                self.step_size.record_fitness(coefficients, fitness.coefficients(values[0::2], values[1::2]).tolist())

    def rate(self, directions: int, examples: int, eps: float, step: int, shaping: State | None = None) -> float:
        """η for step ``step``, of K directions on N examples; ``shaping``: the state of the method's shaping."""
        size = self.step_size
        if self.generates:
            plain = STRIDE * eps * math.sqrt(directions / size.moment.mean) if size.moment.mean else 0.0
        else:
            plain = size.within_reach(size.rate(directions, examples), directions)
        size.expected_fall = 0.5 * plain * size.signal * size.moment.mean
        if size.shaped.count:
            shaping = {**(shaping or {}), SQUARE: size.shaped.mean}
        return plain * gain(self.method, self.rule, size.moment.mean, directions, eps, step, shaping) / self.lr_scale

    def _at(self, evaluate: Callable[[], Tensor], seed: int, step: int) -> At:
        def at(scale: float, direction: int) -> Tensor:
            losses = self.forward.evaluate(evaluate, Offset(scale, seed, step, direction))
            self.forwards += 1
            self.sequences += losses.numel()
            return losses

        return at


@tagged("activations")
def _completed(losses: Tensor) -> Tensor:
    """Losses (P, N); a column with a NaN, that of a failed reward, has the mean of the others, which leaves their mean as it is."""
    failed = losses.isnan().any(dim=0)
    if not bool(failed.any()) or bool(failed.all()):
        return losses
    return torch.where(failed, losses[:, ~failed].mean(dim=1, keepdim=True), losses)
