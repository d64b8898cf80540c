"""The default schedule of a trainer: a constant rate, and in the last third of the steps a straight line to 0."""

from __future__ import annotations

import math
from typing import Any

#: Part of the steps in which the rate falls.
DECAY = 0.3


def completed(lr_scheduler_type: str, given: dict[str, Any] | None, num_training_steps: int) -> dict[str, Any] | None:
    """``lr_scheduler_kwargs`` with what ``warmup_stable_decay`` asks for and was not given; those of other schedules as they are.

    A zeroth-order step makes its progress in flat directions, whose noise no later, smaller step takes back: there a constant rate is
    best. What is noise in sharp directions goes when the rate falls, which takes few steps (2405.18392 on such schedules).
    """
    if str(getattr(lr_scheduler_type, "value", lr_scheduler_type)) != "warmup_stable_decay" or "num_decay_steps" in (given or {}):
        return given
    return {"decay_type": "linear", "num_decay_steps": math.ceil(DECAY * num_training_steps), **(given or {})}
