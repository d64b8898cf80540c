"""A private step's estimate: the public batch decides how losses are evaluated, the sampled examples only enter the clipped sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batches import batch_rows, take_rows
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate
from zotune.optim.construction import RunParts
from zotune.optim.preparation import Preparation
from zotune.optim.privacy import SLACK, PrivateSteps
from zotune.optim.privacy_refusals import NO_BATCH
from zotune.optim.saved_state import header
from zotune.optim.state import StepContext, micro_batches
from zotune.optim.step_transforms import KernelWeights

_ONE_EACH = (
    "a private step needs one loss for each of its {} examples, and the loss function returned {}: return losses of shape (B,), of which "
    "each depends on its own example alone."
)


class PrivateEstimate:
    """Prepares and estimates the steps of a private run."""

    def __init__(self, run: RunParts, private: PrivateSteps, preparation: Preparation) -> None:
        self.run, self.private, self.preparation = run, private, preparation

    def draw(self) -> list[int]:
        """The examples of the next step."""
        self.begin()
        return self.private.draw()

    def begin(self) -> None:
        """Begin the digest of what is released, at the weights before the first step."""
        if self.private.released is None:
            settings = header(self.run, base=True)
            self.private.begin({name: settings[name] for name in ("base", "seed", "method", "options", "groups")})

    def context(self, seed: int, step: int, loss_fn: Any, batch: Any) -> StepContext:
        """The step on its sampled examples: an empty list where there are none."""
        self.begin()
        parts = [] if isinstance(batch, list) and not batch else micro_batches(batch)
        if parts is None:
            raise ValueError(NO_BATCH)
        return StepContext(seed, step, loss_fn, parts)

    def prepare(self, context: StepContext) -> None:
        """What is due before a step's evaluations, on the public batch."""
        self.preparation.prepare(self._public(context))

    def _public(self, context: StepContext) -> StepContext:
        return replace(context, parts=micro_batches(self.private.privacy.public_batch))

    def measure(self, context: StepContext) -> tuple[Estimate, tuple[float, ...]]:
        """(the step's estimate, learning rates)."""
        run, method = self.run, self.run.method
        public = self._public(context)
        if run.evaluator.choice.undecided:
            run.evaluator.evaluate(public)
        if not self.private.checked:
            self._check(public)
            self.private.checked = True
        sample, parts = self.private.draw(), context.parts or []
        singles = self._singles(context) if parts else None
        found = 0 if singles is None else singles.shape[1]
        if found != len(sample):
            raise ValueError(
                f"the step's sample has {len(sample)} examples and the loss function returned {found} losses: give step() the examples "
                "that optimizer.sample() names (an empty list where there are none), and return one loss for each."
            )
        forwards = method.forwards(context.step)
        run.state.count(forwards, forwards * self.private.privacy.batch_size)  # on average: the number itself is not released
        estimate = self.private.estimate(singles, method.directions_of(0))
        kernel = run.transform(KernelWeights)
        if kernel is not None:
            estimate = kernel.weigh(estimate, context)
        return estimate, tuple(run.rates())

    @tagged("activations")
    def _singles(self, context: StepContext) -> Tensor:
        """Coefficients of single examples, (K, N)."""
        losses = self.run.evaluator.evaluate_apart(context)
        return self.run.estimator.singles(losses.values.cpu(), self.run.state.eps, losses.num_directions)

    def _check(self, public: StepContext) -> None:
        """ValueError where an example's coefficient depends on the examples beside it by more than the noise allows for."""
        part = (public.parts or [None])[0]
        try:
            rows = batch_rows(part)
        except NotBatchableError as error:
            raise ValueError(f"{NO_BATCH[:-1]}; {error}.") from None
        if rows < 2:
            raise ValueError("the public batch of a private run needs at least two examples: rows are compared alone and together.")
        together = self._singles(replace(public, parts=[part]))
        if together.shape[1] != rows:
            raise ValueError(_ONE_EACH.format(rows, f"{together.shape[1]} number{'s' * (together.shape[1] != 1)}"))
        apart = torch.cat([self._singles(replace(public, parts=[piece])) for piece in _halves(part, rows)], dim=1)
        privacy = self.private.privacy
        shift = float((together - apart).abs().max()) * privacy.batch_size
        if not shift <= SLACK * privacy.clip:
            raise ValueError(
                f"the coefficients of a step's {privacy.batch_size} examples change by {shift:.2g} in all with the examples beside them (by"
                f" rounding, or as the loss is made), more than {100 * SLACK:g}% of the clip of {privacy.clip:g}, which the noise allows "
                "for: load the model in float32, choose a larger eps or clip, or return losses of which each depends on its own example."
            )


def _halves(part: Any, rows: int) -> Sequence[Any]:
    index = torch.arange(rows)
    return [take_rows(part, piece, rows) for piece in (index[: rows // 2], index[rows // 2 :])]
