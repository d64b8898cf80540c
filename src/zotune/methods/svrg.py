"""The periods of a method with an anchor (see ``anchored``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Anchoring:
    """The periods.

    Args:
        batches: batches that g is estimated from.
        interval: variance-reduced steps until the next anchor.
        ratio: rate of the move by g over that of the others (η₁ / η₂ in the paper).

    Raises:
        ValueError: a number makes no sense.
    """

    batches: int
    interval: int
    ratio: float

    def __post_init__(self) -> None:
        for name in ("batches", "interval"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                label = "anchor_batches" if name == "batches" else name
                raise ValueError(f"{label} must be a whole number of at least 1, not {number!r}.")
        if not self.ratio > 0:
            raise ValueError(f"anchor_ratio must be above 0, not {self.ratio!r}.")

    def place(self, step: int) -> int:
        """Of a step in its period, from 0."""
        return step % (self.batches + self.interval)

    def anchors(self, step: int) -> bool:
        """Whether a step looks at the anchor."""
        return self.place(step) < self.batches

    def key_step(self, step: int) -> int:
        """The step whose directions a step looks along: all of an anchor's along those of the first."""
        return step - self.place(step) if self.anchors(step) else step
