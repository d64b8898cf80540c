"""Small tensors on their way from the host to a device, without waiting for what the device is doing.

torch's ``.to("cuda")`` of ordinary host memory waits until the device has done all it was given. A copy of a few kilobytes that need not
be waited for is staged before the call returns, so the host's tensor may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def send_list(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor`` of these numbers on ``device``."""
    return send(torch.tensor(values, dtype=dtype), device)
