"""Steps along past directions, weighted by what they did to the head's input (PseuZO).

With o the last hidden states at the scored positions and δ = ∂L/∂o (:mod:`zotune.objectives.output_gradients`), a step evaluates o at θ and
at θ + εZ_k, and keeps the mean difference Δ_k. Its own slope is ⟨o(θ + εZ_k) − o(θ), δ⟩ / ε, position by position; the slope along the
direction of an earlier step j is ⟨Δ_j, Σ δ⟩ / ε with δ of now. Parameters behind o, as those of a head of its own, do not change o; they
are trained by the difference of the losses. The record of a step holds its coefficients, those of the steps before it in the window, the
differences of the losses over ε, and Δ, all in bfloat16: replaying and resuming need neither data nor model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zotune.forward.losses import Losses, as_losses
from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate, Estimator
from zotune.methods.history import PastStep
from zotune.methods.output_window import OutputWindow
from zotune.objectives.head_weight import head_weight
from zotune.objectives.output_gradients import OutputGradientRecorder, recording
from zotune.optim.evaluator import Evaluator
from zotune.optim.journal_records import StepRecord
from zotune.optim.state import RunState, StepContext
from zotune.optim.step_transforms import HistoryTransform, Terms
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.coordinate import Offset
from zotune.weights.structure import head_of, masked_head, text_config, transforms_states

#: Scored positions are all recorded.
ALL = 1 << 40


def states_width(model: nn.Module) -> int:
    """Elements of the last hidden states; 0 without a known head."""
    weight = head_weight(head_of(model))
    if weight is None:
        return 0
    return int(text_config(model.config).hidden_size) if transforms_states(model) else weight.shape[1]


def behind_states(model: nn.Module) -> set[str]:
    """Names of the parameters between the last hidden states and the losses that nothing before them has too."""
    owners = [(module, parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None]
    count, names = Counter(id(parameter) for _, parameter in owners), {id(p): name for name, p in model.named_parameters()}
    head = head_of(model)
    own = {names[id(parameter)] for module, parameter in owners if module is head and count[id(parameter)] == 1}
    return own | set(masked_head(model))


class Observation(NamedTuple):
    """What the evaluations of a step found.

    Attributes:
        losses: at θ and at θ + εZ_k, (1 + K, N).
        slopes: ⟨o(θ + εZ_k) − o(θ), δ⟩ of each example, (K, N).
        gradient: Σ δ of an example, on average, (d,).
        differences: o(θ + εZ_k) − o(θ) of a scored position, on average, (K, d).
        evaluated: sequences that went through the model.
    """

    losses: Tensor
    slopes: Tensor
    gradient: Tensor
    differences: Tensor
    evaluated: int


class WindowTransform(HistoryTransform):
    """The window: the steps in it before the next one, and Δ of each, (K, d) in bfloat16."""

    def __init__(self, history: OutputWindow, evaluator: Evaluator, state: RunState) -> None:
        super().__init__(history)
        self.window, self.evaluator, self.run_state = history, evaluator, state
        self.steps: list[int] = []
        self.differences: list[Tensor] = []
        self.width = states_width(evaluator.forward.model)
        self.without = not self.width  # the loss has no output gradients, whatever the batch
        self.warned = False
        self.behind = behind_states(evaluator.forward.model)
        self.plain: list[PastStep] = []  # what they are trained by

    # -- a step -------------------------------------------------------------------------------------------------------------------------

    @tagged("activations")
    def observe(self, context: StepContext) -> Observation | None:
        """Evaluate a step; None where there are no output gradients, or λ is 0."""
        if self.without or context.generates or not self.window.decay(context.step):
            return None
        count, width = self.evaluator.method.directions_of(0), self.width
        heights = [1, 1, count, count, width, count * width, 1]  # of what a table holds of an example
        values, evaluated = self.evaluator.table(context, sum(heights), lambda call: self._rows(context, call, count))
        recorded, losses, others, slopes, gradients, differences, positions = values.cpu().double().split(heights)
        if not bool((recorded == 1).all()):
            self.without = bool((recorded == 0).all())
            if bool((recorded < 0).any()) and not self.warned:
                self.warned = True
                warnings.warn(
                    "the loss returned is neither the recorded one of zotune.objectives nor a constant multiple of it, or the logits are "
                    "not the output of the model's head: the steps of such batches are forward differences.",
                    stacklevel=2,
                )
            self.run_state.count(1, evaluated)
            return None
        mean = differences.sum(dim=1) / positions.sum()
        evaluated *= 1 + count
        return Observation(torch.cat([losses, others]), slopes, gradients.mean(dim=1), mean.view(count, width), evaluated)

    def _rows(self, context: StepContext, call: Callable[[], Any], count: int) -> Tensor:
        """What a micro-batch adds to the table: 1 where it has output gradients, −1 where they are not of what is returned; the rest."""
        key = Key(context.seed, context.step, 0, "", "loss")

        @tagged("activations")
        def here() -> tuple[Tensor, Tensor, OutputGradientRecorder]:
            with isolated_generators(key, self.evaluator.forward.devices), recording(ALL) as recorder:
                recorder.keeps_hidden = True
                with recorder.following():
                    returned = call()
                    valid = recorder.end_call(returned)
                return as_losses([returned]), valid, recorder

        @tagged("activations")
        def there() -> tuple[Tensor, Tensor]:
            with recording(ALL) as recorder:
                recorder.keeps_hidden = True
                losses = as_losses([call()])
            return losses, torch.cat(recorder.hidden)

        forward, eps = self.evaluator.forward, self.run_state.eps
        losses, valid, recorder = forward.evaluate(here, None)
        table = torch.zeros(3 + 2 * count + (1 + count) * self.width, losses.numel(), device=losses.device, dtype=losses.dtype)
        table[1] = losses
        if not recorder.gradients:
            return table
        gradients, hidden = torch.cat(recorder.gradients), torch.cat(recorder.hidden) if recorder.hidden else torch.empty(0)
        if not bool(valid.all()) or recorder.logits_differ or hidden.shape != gradients.shape or hidden.shape[1] != self.width:
            table[0] = -1
            return table
        owners = torch.cat(recorder.examples) * losses.numel() // recorder.num_examples  # a loss of several is their mean
        gradients = gradients * (losses.numel() / recorder.num_examples)
        found = [forward.evaluate(there, Offset(eps, context.seed, context.step, k)) for k in range(count)]
        differences = [moved - hidden for _, moved in found]
        rows = torch.stack([torch.ones_like(losses), losses, *(other for other, _ in found)])
        sums = [torch.stack([(difference * gradients).sum(dim=1) for difference in differences]), gradients.T]
        sums += [difference.T for difference in differences] + [torch.ones_like(owners).unsqueeze(0)]
        columns = torch.cat([each.to(losses) for each in sums])
        return torch.cat([rows, columns.new_zeros(len(columns), losses.numel()).index_add_(1, owners.to(columns.device), columns)])

    @tagged("activations")
    def estimate(self, found: Observation, context: StepContext, estimator: Estimator) -> Estimate:
        """The coefficients of the step's directions, and behind them those of the window and Δ, as the journal stores them."""
        eps, count = self.run_state.eps, len(found.slopes)
        plain = Losses(found.losses, None, count, found.evaluated).estimate(estimator, eps)
        coefficients, differences = found.slopes.mean(dim=1) / eps, found.differences
        good = coefficients.isfinite() & differences.isfinite().all(dim=1) & found.gradient.isfinite().all()
        good &= ~torch.tensor(plain.skipped)
        skipped, coefficients = tuple((~good).tolist()), coefficients.masked_fill(~good, 0.0)
        plain = plain._replace(coefficients=plain.coefficients.masked_fill(~good, 0.0), skipped=skipped)
        if not bool(good.any()):
            return plain
        if self.window.length == 1:
            return plain._replace(coefficients=coefficients.float(), curvatures=plain.coefficients)
        kept = [] if self.window.begins(context.step) else self.differences
        decay = self.window.decay(context.step)
        past = [decay ** (len(kept) - place) / eps * (each.double() @ found.gradient) for place, each in enumerate(kept)]
        beside = torch.cat([*past, plain.coefficients, differences.masked_fill(~good.unsqueeze(1), 0.0).flatten()])
        return plain._replace(coefficients=coefficients.bfloat16().float(), curvatures=beside.bfloat16().float())

    # -- the journal ----------------------------------------------------------------------------------------------------------------------

    def after_journal(self, terms: Terms, record: StepRecord, skipped: bool) -> Terms:
        if self.window.begins(record.step) or not self.window.decay(record.step):
            self.steps, self.differences = [], []
        if skipped:
            return terms
        (now,) = terms.terms
        count = len(now.coefficients)
        beside, most = record.coefficients[count:], self.window.length - 1
        if not beside:
            self.past = self.plain = [now]
            return terms
        end = count * len(self.steps)
        past, plain, difference = beside[:end], beside[end : end + count], beside[end + count :]
        if len(plain) != count or bool(difference) != bool(most) or len(difference) % count:
            raise ValueError(f"the record of step {record.step} is none of a window of {len(self.steps)} steps.")
        parts = [tuple(past[start : start + count]) for start in range(0, len(past), count)]
        self.past, self.plain = [*map(PastStep, self.steps, parts), now], [PastStep(record.step, tuple(plain))]
        if not most:
            return terms
        self.steps = [*self.steps, record.step][-most:]
        self.differences = [*self.differences, torch.tensor(difference).view(count, -1).bfloat16()][-most:]
        return terms

    def past_of(self, name: str) -> list[PastStep]:
        return self.plain if name in self.behind else self.past

    def state(self) -> dict[str, Any]:
        return super().state() | {"steps": self.steps}

    def tensors(self) -> dict[str, Tensor]:
        return {"differences": torch.stack(self.differences)} if self.differences else {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(state, tensors)
        self.steps = list(state["steps"])
        self.differences = [each.clone() for each in tensors["differences"].cpu()] if tensors else []
