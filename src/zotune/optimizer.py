"""``ZerothOrder``: a ``torch.optim.Optimizer`` whose step draws, probes, combines, journals and applies, and never calls backward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune import applying, chosen, following, frozen_linear, layer_scales, methods, observing, readying, residence, run_state
from zotune.anchored import Anchor
from zotune.calibration import Calibrator
from zotune.coordinates import Coordinate, Offset
from zotune.distributed.agreement import settle
from zotune.distributed.workers import Workers
from zotune.estimators import ESTIMATORS, Estimate
from zotune.evaluating import Evaluations, Losses, NonFiniteLossError
from zotune.guidance import Guidance
from zotune.held_linear import held_elsewhere
from zotune.journal import Journal, Record, StepRecord
from zotune.loss_values import LossFunction
from zotune.methods import AUTO, Method
from zotune.probe import Probe
from zotune.replayed import Past
from zotune.rules import Rule
from zotune.shaping import FITNESS, State
from zotune.subspaces import Full, Guided, LowRank, LowRankCoordinate
from zotune.subspaces.full import is_sharded

_NO_BATCH: Any = object()

#: Micro-batches of about so many training examples, the same ones for a step whenever asked: examples(step, count).
Examples = Callable[[int, int], list[Any]]


@dataclass(frozen=True)
class StepReport:
    """What the last step saw.

    Attributes:
        step: steps done so far, this one included.
        loss: mean loss of the batch.
        coefficients: c_k, float32, shape (K,).
        gap: mean absolute loss difference behind the coefficients; None where they are told.
        gap_noise: its standard error over the batch's examples; None for scalar losses.
        skipped: per direction, whether a loss was not finite.
        lr: learning rate of each parameter group.
        terms: the steps whose directions, with these coefficients, the step's estimate was made of; as a rule itself alone.
    """

    step: int
    loss: float
    coefficients: Tensor
    gap: float | None
    gap_noise: float | None
    skipped: tuple[bool, ...]
    lr: tuple[float, ...]
    terms: tuple[Past, ...] = ()


class ZerothOrder(torch.optim.Optimizer):
    """Optimises any module from loss values alone.

    One step evaluates the loss at points θ ± ε Z_k, makes coefficients c_k of the differences, writes them to the journal, and gives
    ĝ = (1/K) Σ c_k Z_k to the method's update rule. Evaluation writes no weight; ``.grad`` stays None; the global generators and every
    module's training flag are as found afterwards. Between steps the model computes with the trained weights, and its ``state_dict()``
    holds them.

    Args:
        model: the module to train. Parameters with ``requires_grad`` move, whatever they are (full model, PEFT adapter, ...).
        method: a name from ``zotune.methods.names()`` or a :class:`~zotune.methods.Method`.
        lr: learning rate η. ``"auto"`` measures it (see ``calibration``); schedulers and the groups' ``lr`` then multiply what is found.
            None takes the method's default, which suits models of a billion parameters.
        params: parameters or parameter groups (as in torch, each with its own ``lr`` and ``weight_decay``) to train instead of all.
        weight_decay: λ in θ ← θ − η (ĝ + λθ); not on vectors (bias, norm), unless you pass groups of your own.
        seed: the run's seed, from which every direction follows.
        max_nonfinite_steps: stop after so many steps in a row without a finite loss.
        probe: how a step's points are evaluated: ``"batched"``, in one forward of stacked rows (least time); ``"sequential"``, one
            after the other (least memory); ``"auto"``, batched where parameters, batch and loss allow it and sequential is not clearly
            faster on the first batch. Losses are equal up to rounding; the journal and checkpoints keep the choice.
        capture: whether batched evaluations on a CUDA device are recorded once a shape of batch and replayed, which saves the host's time
            (see ``captured``): ``"auto"``, small batches of loss functions with ``capturable = True``, as those of ``zotune.objectives``
            have; True, whatever the loss function is: it is then called with tensors to be read no more than once; False, never.
        journal: where to keep the run's record: a path for a new file, a :class:`~zotune.journal.Journal`, or None. Of several workers
            the first keeps it.
        workers: with whom the steps are taken (see :class:`~zotune.distributed.Workers`); None: with all processes of the default group of
            ``torch.distributed``, where there is one.
        examples: ``examples(step, count)`` gives micro-batches of about ``count`` training examples, the same ones whenever it is asked
            for a step, to a method that looks at more than a step's batch now and then (``lozo-g``); None: it makes do with the batch.

    Raises:
        ValueError: an argument makes no sense, or the model is being trained by another ZerothOrder.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> optimizer = ZerothOrder(model, "mezo", lr=1e-2)
        >>> loss = optimizer.step(lambda batch: (model(batch[0]) - batch[1]).square().mean(dim=1), (x, y))
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method = "lozo",
        lr: float | str | None = None,
        *,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        max_nonfinite_steps: int = 10,
        probe: str = "auto",
        capture: bool | str = "auto",
        journal: str | Path | Journal | None = None,
        workers: Workers | None = None,
        examples: Examples | None = None,
    ) -> None:
        self.method = methods.get(method) if isinstance(method, str) else method
        lr = self.method.lr if lr is None else lr
        measured = lr == AUTO
        lr = 1.0 if measured else lr
        for label, number in (("learning rate", lr), ("weight_decay", weight_decay)):
            if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
                auto = " or 'auto'" if label == "learning rate" else ""
                raise ValueError(f"the {label} must be a number of at least 0{auto}, not {number!r}.")
        if max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, not {max_nonfinite_steps}.")
        self.model = model
        self.workers = workers or Workers()
        self.examples = examples
        self.seed = int(seed)
        self.max_nonfinite_steps = max_nonfinite_steps
        self.estimator = ESTIMATORS[self.method.estimator]
        self.rule = Rule(self.method.rule, self.method.rule_args)
        super().__init__(_groups(model, params, weight_decay), {"lr": lr, "weight_decay": 0.0})
        self.coordinates = self._coordinates()
        blocks = self.method.subspace.attach(model, [c for group in self.coordinates for c in group])
        self.method = dataclasses.replace(self.method, blocks=blocks)
        self.layers = self._layers()
        self.directions = chosen.directions(self.method.direction, {c.name: c.shape for group in self.coordinates for c in group})
        self.shaping_state: State = {}
        self.past: list[Past] = []
        self.anchor = Anchor(self.method.anchoring) if self.method.anchoring else None
        self._terms: tuple[Past, ...] = ()
        self._companies: dict[int, list[Any]] = {}
        self.eps: float = math.nan if isinstance(self.method.eps, str) else self.method.eps
        self.probe = Probe(model, [c for group in self.coordinates for c in group], self.directions)
        try:
            self.evaluations = Evaluations(self.probe, self.method, self.estimator, probe, self.workers, capture)
            self.calibrator = self._calibrator(measured) if measured or math.isnan(self.eps) else None
            self.guidance = self._guidance(measured)
        except ValueError:
            self.probe.detach()
            raise
        self.steps = 0
        self.forward_passes = 0
        self.sequences_evaluated = 0
        self.last: StepReport | None = None
        self._nonfinite_in_a_row = 0
        self._prepared = False
        self._begun = -1
        self._gathered = observing.Gathered()
        self.tail: list[Record] = []  # records of an earlier run that the next steps are taken from
        self._settled = False
        self.journal = journal if isinstance(journal, Journal) and self.workers.first else None
        if journal is not None and not isinstance(journal, Journal):
            header = self.header()  # on every worker: of sharded weights each has a part to tell
            self.journal = Journal.create(journal, header) if self.workers.first else None

    def _coordinates(self) -> list[list[Coordinate]]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = []
        for group in self.param_groups:
            if group["weight_decay"] and not self.rule.takes_weight_decay:
                raise ValueError(f"the update rule {self.rule.cls.__name__} has no weight decay; set weight_decay=0.")
            coordinates = []
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not one of the model's own parameters.")
                if not parameter.is_floating_point():
                    raise ValueError(f"{name} is {parameter.dtype}, which cannot be trained; set requires_grad=False on it.")
                if is_sharded(parameter) and not self._takes_shards:
                    raise ValueError(
                        f"{name} is sharded, and {self.method.name} cannot train shards: take a method that moves full weights or low-rank "
                        "ones by plain SGD, with num_directions a number (mezo, lozo)."
                    )
                if held_elsewhere(parameter):
                    raise ValueError(
                        f"{name} is held in few bits by another library, which cannot be written: call zotune.held_linear.hold(model) and "
                        "take a low-rank method (lozo), or train an adapter (PEFT)."
                    )
                coordinate = self.method.subspace.coordinate(name, parameter)
                self._check_residence(coordinate)
                coordinates.append(coordinate)
            groups.append(coordinates)
        return groups

    def _check_residence(self, coordinate: Coordinate) -> None:
        if frozen_linear.owner_of(coordinate.parameter) is not None and not isinstance(coordinate, LowRankCoordinate):
            raise ValueError(
                f"{coordinate.name} is held in few bits, so it moves by low-rank factors only: use lozo, or an adapter (PEFT)."
            )
        home = residence.home(coordinate.parameter)
        if home is None:
            return
        if home.rounds:
            raise ValueError(f"{coordinate.name} is kept in fewer bits while it is away, so it cannot be trained: train an adapter (PEFT).")
        if not coordinate.travels or self.method.anchoring is not None:
            raise ValueError(
                f"{self.method.name} reads weights between evaluations, so they cannot be offloaded: use lozo, mezo or an adapter."
            )

    @property
    def _takes_shards(self) -> bool:
        method = self.method
        plain = self.rule.plain and not (method.replayed or method.anchoring or method.own) and method.estimator in ("central", "forward")
        return plain and type(method.subspace) in (Full, LowRank)

    def _layers(self) -> list[list[LowRankCoordinate]]:
        subspace = self.method.subspace
        if not (isinstance(subspace, LowRank) and subspace.layer_scales):
            return []
        return layer_scales.layers([c for group in self.coordinates for c in group if isinstance(c, LowRankCoordinate)])

    def _calibrator(self, measured: bool) -> Calibrator:
        coordinates = self.probe.coordinates
        scale = sum(c.lr_scale * c.parameter.numel() for c in coordinates) / max(1, sum(c.parameter.numel() for c in coordinates))
        return Calibrator(self.probe, self.method, self.rule, scale, math.isnan(self.eps), measured)

    def _guidance(self, measured: bool) -> Guidance | None:
        subspace = self.method.subspace
        return Guidance(self.probe, self.evaluations, self.rule, subspace.interval, measured) if isinstance(subspace, Guided) else None

    # -- a step ---------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, loss_fn: LossFunction | Callable[[], Tensor], batch: Any = _NO_BATCH) -> Tensor:  # type: ignore[override]
        """One zeroth-order step.

        Args:
            loss_fn: ``loss_fn(batch)`` returns losses per example, shape (B,), or a scalar; without ``batch`` a closure.
            batch: whatever ``loss_fn`` takes. A *list* is a list of micro-batches, evaluated under the same directions. Of several workers
                all give the same, or each a batch of its own.

        Returns:
            The batch's mean loss over the evaluated points, a scalar float32 tensor.

        Raises:
            NonFiniteLossError: ``max_nonfinite_steps`` steps in a row had no finite loss.
            WorkersDisagreeError: workers were found to hold different weights, settings or batches; names the ranks.
            ValueError: the loss has another shape; whatever ``loss_fn`` raises passes through, the weights untouched.
        """
        if not callable(loss_fn):
            raise ValueError("step() needs a function that returns the loss: step(loss_fn, batch) or step(closure).")
        parts, step = _parts(batch), self.steps
        self._settle(parts)
        followed, ready = following.step(self, parts)
        if followed is not None:
            return followed
        if ready:
            applying.begin(self, step)
        else:
            readying.ready(self, loss_fn, parts, step)
        estimate, rates = self._guided_estimate(loss_fn, parts, step, ready) if self.guided else self._estimate(loss_fn, parts, step)
        record = StepRecord(
            step=step,
            lrs=rates,
            loss=float(torch.tensor(estimate.loss, dtype=torch.float32)),
            coefficients=(*estimate.coefficients.tolist(), *estimate.curvatures.tolist()),
            skipped=estimate.skipped + estimate.skipped[: len(estimate.curvatures)],
        )
        if self.journal is not None:
            self.journal.append(record)
        self.apply(record)
        self.last = StepReport(
            self.steps,
            record.loss,
            estimate.coefficients,
            estimate.gap if math.isfinite(estimate.gap) else None,
            estimate.gap_noise,
            estimate.skipped,
            record.lrs,
            self._terms,
        )
        if self._nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteLossError(
                f"the loss was not finite for {self._nonfinite_in_a_row} steps in a row, the last being step {step} (batch {step} of "
                "the run); the weights are those of before. Lower the learning rate or eps, or look at these batches."
            )
        return torch.tensor(record.loss)

    def _estimate(self, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> tuple[Estimate, tuple[float, ...]]:
        """What the step's evaluations along drawn directions amount to, and the learning rates."""
        at = step if self.anchor is None else self.anchor.anchoring.key_step(step)
        losses = self._gather(loss_fn, parts, at)
        self.forward_passes += self.method.forwards(step)
        self.sequences_evaluated += losses.evaluated
        self.probe.foresee(self.seed, at + 1)
        estimate = losses.estimate(self.estimator, self.eps)
        rates = self._rates(estimate, losses)
        fitness = FITNESS[self.method.fitness]
        if fitness is not None:
            means = losses.values.double().mean(dim=1).cpu()
            estimate = estimate._replace(coefficients=fitness.coefficients(means[0::2], means[1::2]))
        if self.anchor is not None and not self.anchor.anchoring.anchors(step):
            evaluate = self.evaluations.function(loss_fn, parts)
            estimate, evaluated = self.anchor.difference(estimate, self.probe, self.estimator, evaluate, self.eps, self.seed, step)
            self.sequences_evaluated += evaluated
        if self.method.conservative:
            estimate = self._lowest(estimate, rates, self.evaluations.function(loss_fn, parts), step)
        return estimate, rates

    @property
    def guided(self) -> bool:
        """Whether output errors tell the next step's coefficients, or told the last one's (see ``guidance``)."""
        return self.guidance is not None and self.guidance.on

    def _guided_estimate(
        self, loss_fn: LossFunction, parts: list[Any] | None, step: int, measured: bool
    ) -> tuple[Estimate, tuple[float, ...]]:
        """What one forward pass tells the guided layers, and the learning rates; ``measured``: what is due for them has been."""
        assert self.guidance is not None
        told = self.guidance.told(loss_fn, parts, self.seed, step)
        self.forward_passes += 1
        self.sequences_evaluated += told.evaluated
        if not measured:
            readying.measure_guided(self, told, self.evaluations.function(loss_fn, parts), step)
        estimate = self.guidance.estimate(told)
        rates = [float(group["lr"]) for group in self.param_groups]
        if self.guidance.measured:
            found = self.guidance.rate(told, estimate, step)
            rates = [found * rate for rate in rates]
        return estimate, tuple(rates)

    def _rates(self, estimate: Estimate, losses: Losses) -> tuple[float, ...]:
        rates = [float(group["lr"]) for group in self.param_groups]
        if self.calibrator is not None and self.calibrator.chooses_lr:
            self.calibrator.tell(losses, estimate, self.eps)
            k, n = len(estimate.coefficients), losses.values.shape[1]
            found = self.calibrator.rate(k, n, self.eps, self.steps, self.shaping_state)
            self.calibrator.step_size.expect(max(rates))
            rates = [found * rate for rate in rates]
        return tuple(rates)

    def _lowest(self, estimate: Estimate, rates: tuple[float, ...], evaluate: Callable[[], Tensor], step: int) -> Estimate:
        """The estimate with c, 0 or −c, whichever of θ − ηcZ, θ and θ + ηcZ has the lowest loss."""
        if len(set(rates)) > 1:
            raise ValueError(f"{self.method.name} compares steps of one length: give all parameter groups the same lr.")
        best, lowest = 0.0, math.inf
        c = float(estimate.coefficients[0])
        for sign in (1.0, 0.0, -1.0):
            losses = self.probe.evaluate(evaluate, Offset(-rates[0] * sign * c, self.seed, step, 0))
            self.sequences_evaluated += losses.numel()
            loss = float(losses.double().mean())
            if loss < lowest:
                best, lowest = sign, loss
        return estimate._replace(coefficients=best * estimate.coefficients)

    def _gather(self, loss_fn: LossFunction, parts: list[Any] | None, step: int) -> Losses:
        """The losses of a step. A run that goes on sequentially though it might have been batched says so in the journal."""
        known = self.evaluations.batched, self.evaluations.apart
        losses = self.evaluations.gather(loss_fn, parts, self.seed, step)
        found = self.evaluations.batched, self.evaluations.apart
        if self.journal is not None and any(now is False and before is not False for now, before in zip(found, known, strict=True)):
            self.journal.append(self.evaluations.event())
        return losses

    def _settle(self, parts: list[Any] | None) -> None:
        """See that all workers are in the same state, at the first step and every so often."""
        workers = self.workers
        due = not self._settled or bool(workers.check_every and self.steps % workers.check_every == 0)
        if workers.several and due:
            settle(self, parts)
        self._settled = True

    @torch.no_grad()
    def apply(self, record: Record) -> None:
        """Take the update a journal record describes; replaying a run is nothing else.

        Raises:
            ValueError: the record is not the next one of this run.
        """
        applying.take(self, record)

    def follow(self, records: Sequence[Record]) -> None:
        """Take the steps to come from records of an earlier run of the same kind, and go on by oneself after them.

        As many calls of :meth:`step` as ``records`` holds steps evaluate nothing, write nothing to the journal and end in the weights,
        bit for bit, that the run had then; the next one goes on from there. So does a run of measured rates, from the last record
        that holds what was measured.
        """
        self.tail = list(records)

    # -- low-rank updates that are still pending ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """Write pending low-rank updates A Vᵀ into the weights now, for code that reads parameters directly.

        The model's forward and ``state_dict()`` hold the trained weights without it. The fold is an event of the journal.
        """
        if self.journal is not None and not self.tail:
            self.journal.append({"event": "fold"})
        applying.fold(self)

    def detach(self) -> None:
        """Leave the model as a plain module with the trained weights: fold, and remove every hook. The optimiser is done then."""
        with torch.no_grad():
            applying.fold(self)
        self.probe.detach()

    # -- state ------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that, with the model's weights, continues the run bit for bit.

        Returns:
            ``state``: tensors by name; ``param_groups``: without the parameters; ``zotune``: numbers and strings, fit for JSON.
        """
        return run_state.save(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from :meth:`state_dict`; load the model's weights first.

        Raises:
            ValueError: the state is another method's, seed's or model's.
        """
        run_state.restore(self, state_dict)

    def header(self, *, base: bool = True) -> dict[str, Any]:
        """What a journal's header says: enough to rebuild this optimiser over the same base weights.

        ``base=False`` leaves out the digest of the weights, which reads all of them.
        """
        return run_state.header(self, base=base)


# -- helpers of one use ------------------------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, params: Iterable[Any] | None, weight_decay: float) -> list[dict[str, Any]]:
    if params is not None:
        given = list(params)
        if given and isinstance(given[0], dict):
            return [{"weight_decay": weight_decay, **group, "params": list(group["params"])} for group in given]
        trainable = given
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on those that should move.")
    if not weight_decay:
        return [{"params": trainable}]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _parts(batch: Any) -> list[Any] | None:
    """The micro-batches of a step; None for a closure."""
    if batch is _NO_BATCH:
        return None
    if not isinstance(batch, list):
        return [batch]
    if not batch:
        raise ValueError("step() was given an empty list of micro-batches.")
    return batch
