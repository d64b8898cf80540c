"""``ZerothOrder``: a ``torch.optim.Optimizer`` whose step evaluates losses, journals and applies coefficients, and never calls backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune import methods
from zotune.forward.losses import LossFunction
from zotune.io.memory_tags import memory_tag
from zotune.methods import AUTO, Method
from zotune.methods.rules import Rule
from zotune.optim import saved_state
from zotune.optim.anchor import Anchor, Drift, drift
from zotune.optim.construction import build, parameter_groups
from zotune.optim.distributed.agreement import settle
from zotune.optim.distributed.workers import Workers
from zotune.optim.journal import Journal
from zotune.optim.journal_records import Record, StepRecord
from zotune.optim.preparation import Preparation
from zotune.optim.privacy import Privacy
from zotune.optim.private_estimate import PrivateEstimate
from zotune.optim.resume import Resume
from zotune.optim.state import NO_BATCH, SampleBatches, StepContext, StepReport, micro_batches
from zotune.optim.step_estimate import StepEstimate
from zotune.optim.update import Updater


def _state(name: str, doc: str) -> Any:
    """A property of the run's state."""
    return property(lambda self: getattr(self.run.state, name), lambda self, value: setattr(self.run.state, name, value), doc=doc)


class ZerothOrder(torch.optim.Optimizer):
    """Optimizes any module from loss values alone.

    One step evaluates the loss at points θ ± ε Z_k, makes coefficients c_k of the differences, writes them to the journal, and gives
    ĝ = (1/K) Σ c_k Z_k to the method's update rule. Evaluation writes no weight; ``.grad`` stays None; the global generators and every
    module's training flag are as found afterwards. Between steps the model computes with the trained weights, and its ``state_dict()``
    holds them.

    Args:
        model: the module to train: all parameters with ``requires_grad`` (full model, PEFT adapter, ...).
        method: a name from ``zotune.methods.names()`` or a :class:`~zotune.methods.Method`.
        lr: learning rate η. ``"auto"`` measures it; schedulers and the groups' ``lr`` then multiply the result. None takes the method's
            default, which suits models of a billion parameters.
        params: parameters or parameter groups (as in torch, each with its own ``lr`` and ``weight_decay``) to train instead of all.
        weight_decay: λ in θ ← θ − η (ĝ + λθ); not on vectors (bias, norm), unless you pass groups of your own.
        anchor_decay: λ in θ ← θ − η (ĝ + λ (θ − θ₀)), θ₀ the weights that training began with (2605.30148); on vectors too. It needs a
            copy of θ₀ (see :class:`~zotune.optim.anchor.Anchor`). Low-rank methods shrink what earlier redraws added to the weights at the
            next redraw, up to an interval late.
        anchor: θ₀, where the model does not have these weights now: a run that resumes from a checkpoint. Given without ``anchor_decay`` it
            is kept for :meth:`drift`.
        seed: the run's seed; it determines every direction.
        max_nonfinite_steps: stop after so many steps in a row without a finite loss.
        forward_batching: how a step's points are evaluated: ``"batched"``, in one forward of stacked rows (least time); ``"sequential"``,
            one after the other (least memory); ``"auto"``, batched where parameters, batch and loss allow it and sequential is not clearly
            faster on the first batch. Losses are equal up to rounding; the journal and checkpoints keep the choice.
        cuda_graphs: whether batched evaluations on a CUDA device are captured once per batch shape and launched again, which saves the
            host's time: ``"auto"``, small batches of loss functions with ``capturable = True``, as those of ``zotune.objectives``; True,
            any loss function, which must not read tensors on the host; False, never.
        journal: where to record the run: a path for a new file, a :class:`~zotune.optim.journal.Journal`, or None. Of several workers the
            first one records.
        workers: the processes that take the steps together (see :class:`~zotune.optim.distributed.Workers`); None: all processes of the
            default group of ``torch.distributed``, if there is one.
        sample_batches: ``sample_batches(step, count)`` returns micro-batches of about ``count`` training examples, the same ones for the
            same step, for a method that samples more than a step's batch (``lozo-g``); None: it takes the batch.
        privacy: makes the run differentially private (see :class:`~zotune.optim.privacy.Privacy`): a step takes the examples that
            :meth:`sample` names, and its loss is not known.

    Raises:
        ValueError: an argument is out of range, or the model is being trained by another ZerothOrder.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> optimizer = ZerothOrder(model, "mezo", lr=1e-2)
        >>> loss = optimizer.step(lambda batch: (model(batch[0]) - batch[1]).square().mean(dim=1), (x, y))
    """

    steps = _state("steps", "Steps done so far.")
    forward_passes = _state("forward_passes", "Evaluations of the batch so far.")
    sequences_evaluated = _state("sequences_evaluated", "Examples that went through the model so far.")
    eps = _state("eps", "ε; NaN until it is measured.")
    journal = _state("journal", "Where steps are recorded; None: nowhere.")
    tail = _state("tail", "Records of an earlier run that the next steps are taken from.")

    def __init__(
        self,
        model: nn.Module,
        method: str | Method = "lozo",
        lr: float | str | None = None,
        *,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        anchor_decay: float = 0.0,
        anchor: Anchor | None = None,
        seed: int = 0,
        max_nonfinite_steps: int = 10,
        forward_batching: str = "auto",
        cuda_graphs: bool | str = "auto",
        journal: str | Path | Journal | None = None,
        workers: Workers | None = None,
        sample_batches: SampleBatches | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        method = methods.get(method) if isinstance(method, str) else method
        lr = method.lr if lr is None else lr
        measured = lr == AUTO
        lr = 1.0 if measured else lr
        for label, number in (("learning rate", lr), ("weight_decay", weight_decay), ("anchor_decay", anchor_decay)):
            if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
                auto = " or 'auto'" if label == "learning rate" else ""
                raise ValueError(f"the {label} must be a number of at least 0{auto}, not {number!r}.")
        if max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, not {max_nonfinite_steps}.")
        self.model, self.seed, self.max_nonfinite_steps = model, int(seed), max_nonfinite_steps
        self.workers = workers or Workers()
        self.rule = Rule(method.update_rule, method.update_rule_args)
        groups = parameter_groups(model, params, weight_decay, anchor_decay)
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "anchor_decay": 0.0})
        self.run = run = build(
            model,
            method,
            self.rule,
            self.param_groups,
            seed=self.seed,
            forward_batching=forward_batching,
            cuda_graphs=cuda_graphs,
            workers=self.workers,
            sample_batches=sample_batches,
            measured=measured,
            anchor=anchor,
            privacy=privacy,
        )
        self.method, self.estimator, self.directions, self.layers = run.method, run.estimator, run.directions, run.layers
        self.forward, self.evaluator = run.forward, run.evaluator
        self.calibrator, self.output_gradients = run.calibrator, run.output_gradients
        self.updater = Updater(run)
        self.resume = Resume(run, self.updater)
        self.preparation = Preparation(run, self.updater)
        self.private = None if run.private is None else PrivateEstimate(run, run.private, self.preparation)
        self.step_estimate = StepEstimate(run, self.preparation, self.private)
        self.last_report: StepReport | None = None
        try:
            self._start_journal(journal)
        except BaseException:  # the model stays free for another optimizer
            self.forward.remove_hooks()
            raise

    def _start_journal(self, journal: str | Path | Journal | None) -> None:
        self.journal = journal if isinstance(journal, Journal) and self.workers.first else None
        if journal is None or isinstance(journal, Journal):
            return
        header = self.header()  # on every worker: each has a part of sharded weights

        def create() -> None:
            self.journal = Journal.create(journal, header)

        self.workers.from_first(create)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss_fn: LossFunction | Callable[[], Tensor] | None = None, batch: Any = NO_BATCH, closure: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """One zeroth-order step.

        Args:
            loss_fn: ``loss_fn(batch)`` returns losses per example, shape (B,), or a scalar; without ``batch`` a closure.
            batch: any argument of ``loss_fn``. A *list* is a list of micro-batches, evaluated under the same directions. Several
                workers pass the same batch, or each its own.
            closure: torch's name of a ``loss_fn`` without a batch, by which Lightning Fabric passes it.

        Returns:
            The batch's mean loss over the evaluated points, a scalar float32 tensor.

        Raises:
            NonFiniteLossError: ``max_nonfinite_steps`` steps in a row had no finite loss.
            RankMismatchError: workers have different weights, settings or batches; names the ranks.
            ValueError: the loss has another shape; whatever ``loss_fn`` raises passes through, the weights untouched.
        """
        if loss_fn is None and batch is NO_BATCH:
            loss_fn, closure = closure, None
        if not callable(loss_fn) or closure is not None:
            raise ValueError("step() needs a function that returns the loss: step(loss_fn, batch) or step(closure).")
        state = self.run.state
        private = self.private
        if private is None:
            context = StepContext(self.seed, state.steps, loss_fn, micro_batches(batch))
        else:
            context = private.context(self.seed, state.steps, loss_fn, batch)
        if self.calibrator is not None:
            self.calibrator.generates = context.generates
        self._settle(context.parts)
        self.workers.begin_step(context.step, context.parts)
        resumed, prepared = self.resume.step(context.parts)
        if resumed is not None:
            return self._report(resumed)
        if prepared:
            self.updater.begin(context.step)
        elif private is None:
            self.preparation.prepare(context)
        else:
            private.prepare(context)
        estimate, rates = self.step_estimate.measure(context, prepared)
        record = StepRecord.of_estimate(context.step, estimate, rates)
        state.write(record)
        self.apply(record)
        loss_diff = estimate.loss_diff if math.isfinite(estimate.loss_diff) else None
        stderr, skipped = estimate.loss_diff_stderr, estimate.skipped
        loss = self._report(StepReport(state.steps, record.loss, estimate.coefficients, loss_diff, stderr, skipped, rates, state.terms))
        state.check_finite(context.step, self.max_nonfinite_steps)
        return loss

    def sample(self) -> list[int]:
        """The examples of the next step of a private run, by their numbers in the data set: none, some or all.

        Raises:
            ValueError: the run is not private.
        """
        if self.private is None:
            raise ValueError("only a private run samples its examples: give ZerothOrder privacy=zotune.Privacy(...).")
        return self.private.draw()

    def _report(self, report: StepReport) -> Tensor:
        self.last_report = report
        with memory_tag("activations"):
            return torch.tensor(report.loss)

    def _settle(self, parts: list[Any] | None) -> None:
        """Check that all workers are in the same state: at the first step, and every ``check_every`` steps."""
        workers, state = self.workers, self.run.state
        due = not state.settled or bool(workers.check_every and state.steps % workers.check_every == 0)
        if workers.several and due:
            settle(self.run, parts)
        state.settled = True

    @torch.no_grad()
    def apply(self, record: Record) -> None:
        """Apply the update or event of a journal record; replaying a run is nothing else.

        Raises:
            ValueError: the record is not the next one of this run.
        """
        if self.private is not None:
            self.private.begin()
        self.updater.apply(record)

    def fast_forward(self, records: Sequence[Record]) -> None:
        """Take the next steps from records of an earlier run of the same kind, then continue.

        As many calls of :meth:`step` as ``records`` holds steps evaluate nothing, write nothing to the journal, and end in that run's
        weights, bit for bit. A run of measured rates continues from the last record with the complete state of the measurements.
        """
        self.tail = records

    @torch.no_grad()
    def flush_updates(self) -> None:
        """Write pending low-rank updates A Vᵀ into the weights now, for code that reads parameters directly.

        The model's forward and ``state_dict()`` hold the trained weights without it. The fold is an event of the journal.
        """
        if not self.tail:
            self.run.state.write({"event": "fold"})
        self.updater.fold()

    def drift(self) -> Drift | None:
        """‖θ − θ₀‖, θ₀ the weights that training began with; None where they are not kept (see ``anchor_decay`` and ``anchor``)."""
        return drift(self.run.anchor, self.forward.coordinates)

    def remove_hooks(self) -> None:
        """Make the model a plain module with the trained weights: fold, and remove every hook. The optimizer cannot be used afterwards."""
        try:
            with torch.no_grad():
                self.updater.fold()
        finally:
            self.forward.remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Everything that, with the model's weights, continues the run bit for bit.

        Returns:
            ``state``: tensors by name; ``param_groups``: without the parameters; ``zotune``: numbers and strings, fit for JSON.
        """
        return saved_state.save(self.run)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from :meth:`state_dict`; load the model's weights first.

        Raises:
            ValueError: the state is another method's, seed's or model's.
        """
        saved_state.restore(self.run, state_dict)

    def header(self, *, base: bool = True) -> dict[str, Any]:
        """The header of a journal: enough to rebuild this optimizer over the same base weights.

        ``base=False`` leaves out the digest of the weights, which reads all of them.
        """
        return saved_state.header(self.run, base=base)
