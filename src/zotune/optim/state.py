"""What a step changes beside the weights: :class:`RunState`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from zotune.methods.coefficients import State
from zotune.methods.history import Past
from zotune.optim.journal import Journal, Record
from zotune.optim.journal_events import Gathered
from zotune.subspaces.coordinate import Coordinate


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
        nonfinite_in_a_row: steps in a row, up to the last one, without a finite loss.
        prepared: whether fast and general path of the forward have been compared.
        begun: the last step that coordinates were redrawn for.
        settled: whether the workers have been compared once.
        terms: the last step's :class:`~zotune.optim.report.StepReport` has them.
        past: the last steps' coefficients, where updates are made of them.
        shaping: what the shaping of coefficients keeps.
        gathered: tensors of journal events that are not whole yet.
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
    terms: tuple[Past, ...] = ()
    past: list[Past] = field(default_factory=list)
    shaping: State = field(default_factory=dict)
    gathered: Gathered = field(default_factory=Gathered)
    tail: list[Record] = field(default_factory=list)
    journal: Journal | None = None

    def write(self, record: Record) -> None:
        """Append a record to the journal, if there is one."""
        if self.journal is not None:
            self.journal.append(record)

    def count(self, forwards: int, sequences: int) -> None:
        """Count evaluations."""
        self.forward_passes += forwards
        self.sequences_evaluated += sequences

    def every_coordinate(self) -> Iterator[Coordinate]:
        """All coordinates, group by group."""
        return (coordinate for group in self.coordinates for coordinate in group)

    def by_name(self) -> dict[str, Coordinate]:
        """All coordinates by name."""
        return {coordinate.name: coordinate for coordinate in self.every_coordinate()}
