"""Copies of small tensors from the host to a device without synchronization.

torch's ``.to("cuda")`` of pageable host memory waits for all work of the device. A non-blocking copy of a few kilobytes is staged before
the call returns, so the host's tensor may be freed.
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
    """``torch.tensor`` of these values on ``device``."""
    return send(torch.tensor(values, dtype=dtype), device)
