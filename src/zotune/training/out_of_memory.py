"""A step that does not fit into memory: recognized on any device, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def memory_advice(args: Any, step: int) -> str:
    """A sentence on a step that did not fit.

    Args:
        args: a :class:`zotune.ZOConfig`.
        step: that was not taken.
    """
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = "try shorter sequences, or half-precision weights"
    if size > 1:
        smaller = size // 2
        advice = f"try per_device_train_batch_size={smaller}"
        if size % 2 == 0:
            advice += f" with gradient_accumulation_steps={2 * accumulated}, which is the same batch in more pieces"
    elif args.forward_batching == "batched":
        advice = "try forward_batching='sequential', which evaluates one point at a time"
    return (
        f"out of memory in step {step}, with {size} example{'s' * (size > 1)} in a forward; {advice}. "
        "The weights are those before the step, and the run can be resumed from its last checkpoint."
    )
