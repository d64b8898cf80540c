"""The optimizer of a training step that was taken before Hugging Face's loop calls it: :class:`SteppedOptimizer`."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from zotune.baselines import FirstOrder
from zotune.optim.optimizer import ZerothOrder


class SteppedOptimizer(AcceleratedOptimizer):
    """The optimizer in Hugging Face's loop: `training_step` has already stepped when the loop calls it.

    Accelerate regards it as prepared, and so does not copy its state.
    """

    _is_accelerate_prepared = True

    def __init__(self, optimizer: ZerothOrder | FirstOrder) -> None:
        super().__init__(optimizer, device_placement=False)

    def step(self, closure: Any = None) -> None:
        """Nothing: the step has been taken."""

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Nothing: there are no gradients."""
