"""What a step reports: :class:`StepReport`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zotune.methods.history import Past


@dataclass(frozen=True)
class StepReport:
    """What the last step saw.

    Attributes:
        step: steps done so far, this one included.
        loss: mean loss of the batch.
        coefficients: c_k, float32, shape (K,).
        loss_diff: mean absolute loss difference behind the coefficients; None where they come from output gradients.
        loss_diff_stderr: its standard error over the batch's examples; None for scalar losses.
        skipped: per direction, whether a loss was not finite.
        lr: learning rate of each parameter group.
        terms: the steps whose directions, with these coefficients, the step's estimate was made of; as a rule itself alone.
    """

    step: int
    loss: float
    coefficients: Tensor
    loss_diff: float | None
    loss_diff_stderr: float | None
    skipped: tuple[bool, ...]
    lr: tuple[float, ...]
    terms: tuple[Past, ...] = ()
