"""The schedule of SVRG snapshots (MeZO-SVRG, 2404.08080); :mod:`zotune.optim.svrg` takes the steps."""

from __future__ import annotations

from dataclasses import dataclass

from zotune.methods.coefficients import CoefficientTransform, State


@dataclass(frozen=True)
class SVRGSchedule(CoefficientTransform):
    """Periods of ``batches`` steps at a snapshot θ̄, then ``interval`` variance-reduced steps.

    Args:
        batches: batches that the snapshot's gradient estimate g is made from.
        interval: variance-reduced steps until the next snapshot.
        ratio: learning rate of the update by g over that of the others (η₁ / η₂ in the paper).

    Raises:
        ValueError: a value is out of range.
    """

    batches: int
    interval: int
    ratio: float
    replaces_rule = True

    def __post_init__(self) -> None:
        for label, number in (("anchor_batches", self.batches), ("interval", self.interval)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{label} must be a whole number of at least 1, not {number!r}.")
        if not self.ratio > 0:
            raise ValueError(f"anchor_ratio must be above 0, not {self.ratio!r}.")

    def position(self, step: int) -> int:
        """Of a step in its period, from 0."""
        return step % (self.batches + self.interval)

    def at_snapshot(self, step: int) -> bool:
        """Whether a step evaluates the snapshot itself."""
        return self.position(step) < self.batches

    def key_step(self, step: int) -> int:
        """The step whose directions a step takes: all steps at a snapshot take those of the first."""
        return step - self.position(step) if self.at_snapshot(step) else step

    def extra_forwards(self, step: int, points: int) -> int:
        return 0 if self.at_snapshot(step) else points

    def scalars(self, directions: int) -> int:
        return directions + 1

    def gain(self, moment: float, directions: int, eps: float, state: State) -> float:
        raise ValueError("learning rate 'auto' is not known for SVRG, which has two; give a number.")
