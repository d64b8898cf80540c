"""What a step takes (:class:`StepContext`), changes beside the weights (:class:`RunState`), and reports (:class:`StepReport`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from zotune.errors import NonFiniteLossError
from zotune.forward.losses import LossFunction
from zotune.methods.history import PastStep
from zotune.optim.journal import Journal
from zotune.optim.journal_events import TensorAssembler
from zotune.optim.journal_records import Record
from zotune.subspaces.coordinate import Coordinate

#: In place of a batch: the loss function is a closure.
NO_BATCH: Any = object()
#: sample_batches(step, count): micro-batches of about ``count`` training examples, the same ones for the same step.
SampleBatches = Callable[[int, int], list[Any]]


@dataclass(frozen=True)
class StepContext:
    """The run's seed, the step and its data: with the weights they determine the step.

    Attributes:
        seed: the run's seed.
        step: its number, from 0.
        loss_fn: loss of one micro-batch; without arguments where there is no batch.
        parts: the micro-batches; None for a closure.
    """

    seed: int
    step: int
    loss_fn: LossFunction
    parts: list[Any] | None

    @property
    def smooth(self) -> StepContext:
        """The step with a loss that varies smoothly with the weights, where the loss itself is a reward of generated texts."""
        return replace(self, loss_fn=getattr(self.loss_fn, "proxy", self.loss_fn))

    @property
    def generates(self) -> bool:
        """Whether the loss generates texts."""
        return hasattr(self.loss_fn, "proxy")

    def at(self, step: int) -> StepContext:
        """The same data under the directions of another step."""
        return self if step == self.step else replace(self, step=step)


def micro_batches(batch: Any) -> list[Any] | None:
    """The micro-batches of a step; None for a closure.

    Raises:
        ValueError: an empty list.
    """
    if batch is NO_BATCH:
        return None
    if not isinstance(batch, list):
        return [batch]
    if not batch:
        raise ValueError("step() was given an empty list of micro-batches.")
    return batch


@dataclass
class RunState:
    """The mutable state of a run.

    Attributes:
        seed: the run's seed.
        coordinates: what is trained, by parameter group.
        eps: ε; NaN until it is measured.
        steps: steps done so far.
        forward_passes: evaluations of the batch so far.
        sequences_evaluated: examples that went through the model so far.
        nonfinite_in_a_row: the latest steps in a row without a finite loss.
        prepared: whether fast and general path of the forward have been compared.
        begun: the last step that coordinates were redrawn for.
        settled: whether the workers have been compared once.
        terms: of the last step's :class:`StepReport`.
        assembler: tensors of journal events that are not complete yet.
        tail: records of an earlier run that the next steps are taken from.
        journal: where steps and events are recorded; None: nowhere.
    """

    seed: int
    coordinates: list[list[Coordinate]]
    eps: float
    steps: int = 0
    forward_passes: int = 0
    sequences_evaluated: int = 0
    nonfinite_in_a_row: int = 0
    prepared: bool = False
    begun: int = -1
    settled: bool = False
    terms: tuple[PastStep, ...] = ()
    assembler: TensorAssembler = field(init=False)
    tail: Sequence[Record] = ()
    journal: Journal | None = None

    def __post_init__(self) -> None:
        self.assembler = TensorAssembler({c.name: c.parameter.numel() for c in self.every_coordinate()})

    def write(self, record: Record) -> None:
        """Append a record to the journal, if there is one."""
        if self.journal is not None:
            self.journal.append(record)

    def count(self, forwards: int, sequences: int) -> None:
        """Count evaluations."""
        self.forward_passes += forwards
        self.sequences_evaluated += sequences

    def check_finite(self, step: int, most: int) -> None:
        """Raise NonFiniteLossError where ``most`` steps in a row, the last being ``step``, had no finite loss."""
        count = self.nonfinite_in_a_row
        if count >= most:
            raise NonFiniteLossError(
                f"the loss was not finite for {count} steps in a row, the last being step {step} (batch {step} of "
                "the run); the weights are those of before. Lower the learning rate or eps, or look at these batches."
            )

    def every_coordinate(self) -> Iterator[Coordinate]:
        """All coordinates, group by group."""
        return (coordinate for group in self.coordinates for coordinate in group)

    def by_name(self) -> dict[str, Coordinate]:
        """All coordinates by name."""
        return {coordinate.name: coordinate for coordinate in self.every_coordinate()}


@dataclass(frozen=True)
class StepReport:
    """What the last step found.

    Attributes:
        step: steps done so far, this one included.
        loss: mean loss of the batch.
        coefficients: c_k, float32, shape (K,).
        loss_diff: mean absolute loss difference behind the coefficients; None where they come from output gradients.
        loss_diff_stderr: its standard error over the batch's examples; None for scalar losses.
        skipped: per direction, whether a loss was not finite.
        lr: learning rate of each parameter group.
        terms: the steps whose directions and coefficients made the update; none where a rule takes the estimate as it is.
    """

    step: int
    loss: float
    coefficients: Tensor
    loss_diff: float | None
    loss_diff_stderr: float | None
    skipped: tuple[bool, ...]
    lr: tuple[float, ...]
    terms: tuple[PastStep, ...] = ()
