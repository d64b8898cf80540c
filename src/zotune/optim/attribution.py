"""What each training example contributes to a step, and the step's derivatives of a validation loss along the same directions.

A plain step is θ ← θ − (1/K) Σ_k c_k D Z_k, D the learning rates of the coordinates, and c_k = Σ_i c_ik is a sum over the examples. To
first order example i changes a validation loss L_v by −(η/K) Σ_k c_ik v_k, v_k = ⟨∇L_v, D Z_k⟩ / η, the derivative at the same θ. In
expectation over Z that is the step's term of TracIn (2002.08484) and the first-order in-run data Shapley value (2406.11011).

:class:`Attribution` writes c_ik and v_k to the journal, as events ``attribution`` before the record of the step; replaying skips them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.forward.batches import assign_directions, batch_rows
from zotune.forward.losses import Losses, LossFunction, evaluation
from zotune.io.memory_tags import tagged
from zotune.methods import Method
from zotune.methods.coefficients import FITNESS, ByDeviation, ByRootMeanSquare
from zotune.methods.rules import Rule
from zotune.methods.rules.ema import EMASGD
from zotune.optim.construction import RunParts
from zotune.optim.journal_events import TensorAssembler, events
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.state import StepContext
from zotune.subspaces import Activation, Blocks, Full, Guided, LowRank, Sparse
from zotune.subspaces.coordinate import Offset

EVENT = "attribution"
#: Elements of an event's tensors, at most: examples times directions.
_MOST = 1 << 26
_LIMITS = dict.fromkeys(("contributions", "rows", "slopes", "bends", "loss"), _MOST)
#: Subspaces whose update is along the directions that were evaluated, θ ← θ − (η/K) Σ c_k Z_k.
_PLAIN_SUBSPACES = (Full, LowRank, Activation, Sparse, Blocks)
WORKING = "take mezo, lozo, lozo-e or another method that adds the losses' coefficients times their directions"


def momentum_of(method: Method) -> tuple[float, float, bool]:
    """(β, weight of an estimate in the buffer, whether the first one has weight 1): v ← β v + weight · ĝ, θ ← θ − η v; β = 0 without one.

    Raises:
        ValueError: the update is not linear in the estimates; the message names methods whose is.
    """
    rule = Rule(method.update_rule, method.update_rule_args)
    if rule.plain:
        return 0.0, 1.0, False
    options = method.update_rule_args
    if rule.cls is EMASGD:
        beta = float(options.get("beta", 0.9))
        return beta, 1 - beta, False
    if rule.cls is torch.optim.SGD and not (options.get("nesterov") or options.get("maximize")):
        return float(options["momentum"]), 1 - float(options.get("dampening", 0.0)), True
    raise ValueError(
        f"the shares of examples cannot be told for {method.name}, whose rule {rule.cls.__name__} is not linear in the examples' losses: "
        f"{WORKING}."
    )


def check(method: Method) -> None:
    """ValueError, in one sentence, where the steps of a method are not sums over examples."""
    reason = None
    if isinstance(method.subspace, Guided):
        reason = "whose guided phases go along output gradients, not along directions that validation examples are evaluated along too"
    elif method.history or method.svrg or method.selection or method.projection:
        reason = "whose steps are made of several steps' estimates or of chosen candidates"
    elif FITNESS[method.fitness] is not None:
        reason = f"with fitness {method.fitness!r}, where an example's coefficient depends on the losses of all points"
    elif method.shaping is not None and not isinstance(method.shaping, ByDeviation | ByRootMeanSquare):
        reason = "which transforms its coefficients in a way that is not linear in the examples' losses"
    elif type(method.subspace) not in _PLAIN_SUBSPACES or method.estimator == "curvature":
        reason = "whose subspace is none of full, low-rank, sparse and blockwise weights, or scales its directions by curvature"
    if reason is not None:
        raise ValueError(f"the shares of examples cannot be told for {method.name}, {reason}: {WORKING}.")
    beta, _, _ = momentum_of(method)
    if beta and type(method.subspace) is not Full:
        raise ValueError(
            f"the shares of examples cannot be told for {method.name}, whose momentum is projected at every redraw of its subspace: "
            f"{WORKING}."
        )


class Attributed(NamedTuple):
    """What the journal holds of one measured step; of the end of a run, the loss alone.

    Attributes:
        step: its number.
        rows: of the examples in the training data, (N,).
        contributions: c_ik, float32: with shared directions (K, N); with directions per example or group, those of its own (K / groups, N).
        groups: that have directions of their own; 0: all share them.
        slopes: v_k, float32, (K,).
        bends: second derivatives of L_v along the directions, float32, (K,); empty where coordinates have different rates.
        loss: L_v(θ).
        loss_error: its standard error over the validation examples.
    """

    step: int
    rows: Tensor
    contributions: Tensor
    groups: int
    slopes: Tensor
    bends: Tensor
    loss: float
    loss_error: float

    @property
    def owners(self) -> Tensor:
        """The direction of each contribution, of the same shape."""
        each, n = self.contributions.shape
        if not self.groups:
            return torch.arange(each).unsqueeze(1).expand(each, n)
        return (torch.arange(n) * self.groups // max(n, 1) * each).unsqueeze(0) + torch.arange(each).unsqueeze(1)

    @property
    def sums(self) -> Tensor:
        """Σ_i c_ik of every direction, float64, (K,): the step's coefficients before any transform."""
        zeros = torch.zeros(len(self.slopes), dtype=torch.float64)
        return zeros.index_add_(0, self.owners.flatten(), self.contributions.double().flatten())


class Attribution:
    """Measures and records the contributions of a run's examples.

    Args:
        run: the optimizer's parts.
        loss_fn: loss per example of a micro-batch.
        batches: micro-batches of validation examples.
        every: steps between measured steps; step 0 is one.

    Attributes:
        rows: of the coming step's examples in the training data, (N,).

    Raises:
        ValueError: the method's steps are not sums over examples, or several processes take them.
    """

    def __init__(self, run: RunParts, loss_fn: LossFunction, batches: Sequence[Any], every: int) -> None:
        check(run.method)
        if run.workers.several:
            raise ValueError("the shares of examples are recorded by one process: start the run without torchrun or accelerate launch.")
        if run.forward.streams or run.forward.by_engine:
            raise ValueError("the shares of examples need a model in memory that torch computes: leave offloading, or the GGUF file, out.")
        if every < 1:
            raise ValueError(f"attribute_every must be at least 1, not {every}.")
        self.run, self.every, self.rows = run, every, torch.empty(0, dtype=torch.long)
        self._evaluate = evaluation(loss_fn, list(batches))
        self._count = sum(batch_rows(batch) for batch in batches)

    @torch.no_grad()
    def record(self, context: StepContext, losses: Losses, rates: Sequence[float]) -> None:
        """Record a step that is due, after its losses and before its update.

        Raises:
            ValueError: there is not one finite loss for every example.
        """
        if context.step % self.every:
            return
        contributions, groups = self._contributions(context, losses)
        here = self._losses(context, 0.0, 0)
        slopes, bends, evaluations = self._derivatives(context, losses.num_directions, here, rates)
        tensors = {"contributions": contributions, "rows": self.rows.int(), "slopes": slopes, "bends": bends, "loss": _summary(here)}
        self._write(context.step, tensors, groups, (evaluations + 1) * self._count)

    @torch.no_grad()
    def finish(self) -> None:
        """Record the validation loss of the weights as they are, after a run's last step."""
        run = self.run
        here = self._losses(StepContext(run.state.seed, run.state.steps, self._evaluate, None), 0.0, 0)
        self._write(run.state.steps, {"loss": _summary(here)}, 0, self._count)

    def _write(self, step: int, tensors: Mapping[str, Tensor], groups: int, sequences: int) -> None:
        self.run.state.count(0, sequences)
        for place, event in enumerate(events(step, tensors)):
            self.run.state.write({**event, "event": EVENT, "groups": groups, "sequences": 0 if place else sequences})

    @tagged("activations")
    def _losses(self, context: StepContext, scale: float, direction: int, only: list[str] | None = None) -> Tensor:
        """Losses of the validation examples at θ + scale · Z_direction, float64, (V,)."""
        offset = Offset(scale, context.seed, context.step, direction)
        found = self.run.forward.evaluate(self._evaluate, offset, only=only).double().cpu()
        if len(found) != self._count:
            raise ValueError("the shares of examples need one loss for each, and this loss function returns one number for a batch.")
        return found

    def _derivatives(self, context: StepContext, directions: int, here: Tensor, rates: Sequence[float]) -> tuple[Tensor, Tensor, int]:
        """v_k, second derivatives, and evaluations of the validation examples for them."""
        run, eps = self.run, self.run.state.eps
        top = max(rates) or 1.0
        factors: dict[float, list[str]] = {}
        for rate, coordinates in zip(rates, run.state.coordinates, strict=True):
            for coordinate in coordinates:
                factors.setdefault(rate / top * coordinate.lr_scale, []).append(coordinate.name)
        slopes, bends = [], []
        for k in range(directions):
            slope = 0.0
            for factor, names in factors.items():
                only = names if len(factors) > 1 else None
                plus, minus = (self._losses(context, sign * eps, k, only) for sign in (1, -1))
                slope += factor * float((plus - minus).mean()) / (2 * eps)
                if only is None:
                    bends.append(factor**2 * float((plus + minus - 2 * here).mean()) / eps**2)
            slopes.append(slope)
        return torch.tensor(slopes), torch.tensor(bends), 2 * directions * len(factors)

    @tagged("activations")
    def _contributions(self, context: StepContext, losses: Losses) -> tuple[Tensor, int]:
        """c_ik, (K, N), or (K / groups, N) and the number of groups."""
        run, k = self.run, losses.num_directions
        try:
            sizes = [batch_rows(part) for part in context.parts or ()]
        except NotBatchableError:
            sizes = []
        values, total, eps = losses.values.cpu().double(), sum(sizes), run.state.eps
        if len(self.rows) != total:
            raise ValueError(f"a step of {total} examples has the numbers of {len(self.rows)}: the shares would go to wrong ones.")
        if losses.owners is None:
            if values.shape[1] != total:
                raise ValueError("the shares of examples need one loss for each, and this loss function returns one number for a batch.")
            found = run.estimator.singles(values, eps, k) / total
            return found.masked_fill(~found.sum(dim=1, keepdim=True).isfinite(), 0.0).float(), 0
        each = run.method.num_directions
        groups = k // each
        high, low = (values[0], values[1]) if run.estimator.signs[0] == 1 else (values[1], values[0])
        width = eps * (max(run.estimator.signs) - min(run.estimator.signs))
        owners = losses.owners.cpu()
        scaled = (high - low) * (k / (len(owners) * width))
        bad = torch.zeros(k, dtype=torch.float64).index_add_(0, owners, scaled).isfinite().logical_not()
        scaled = scaled.masked_fill(bad[owners], 0.0)
        found, start, column = torch.zeros(each, total, dtype=torch.float64), 0, 0
        for size, one in zip(sizes, assign_directions(sizes, groups, each), strict=True):
            found[torch.tensor(one.directions) % each, torch.tensor(one.examples) + start] = scaled[column : column + len(one)]
            start, column = start + size, column + len(one)
        return found.float(), groups


def _summary(losses: Tensor) -> Tensor:
    """(mean, standard error), float64."""
    error = losses.std() / len(losses) ** 0.5 if len(losses) > 1 else torch.tensor(float("nan"))
    return torch.stack([losses.mean(), error.to(losses.dtype)])


def attributed(records: Iterable[Record]) -> Iterator[tuple[Attributed, StepRecord | None]]:
    """The measured steps of a journal, each with the record of the step, and last what the end of the run recorded, without one.

    A step that was measured twice, since the run stopped before its update, counts once.
    """
    assembler, groups, step = TensorAssembler(_LIMITS), 0, -1
    whole: dict[str, Tensor] = {}
    for record in records:
        if isinstance(record, StepRecord):
            if step == record.step and "contributions" in whole:
                yield _attributed(step, whole, groups), record
            whole = {}
        elif record.get("event") == EVENT:
            if step != record["step"]:
                whole = {}
            step, groups = int(record["step"]), int(record["groups"])
            whole |= assembler.add(record)
    if whole.keys() == {"loss"}:
        yield _attributed(step, whole, groups), None


def _attributed(step: int, tensors: Mapping[str, Tensor], groups: int) -> Attributed:
    rows, contributions, slopes, bends = (tensors.get(name, torch.empty(0)) for name in ("rows", "contributions", "slopes", "bends"))
    loss, error = tensors["loss"].tolist()
    return Attributed(step, rows, contributions, groups, slopes, bends, loss, error)
