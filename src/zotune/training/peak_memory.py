"""Peak memory of a process or of a GPU: :class:`PeakMemory`."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory since `start()`: of the CUDA allocator on a GPU, else the resident set, which only Linux can reset."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self.start()

    def start(self) -> None:
        """Resets the peak; the present use is the baseline."""
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.baseline = torch.cuda.memory_allocated(self._cuda)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")
        self.baseline = _status_bytes("VmRSS") or _high_water()

    def peak(self) -> int:
        """Peak in bytes since `start()`."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        # The kernel's figures are exact to some hundred kilobytes only, so a peak may read below the baseline.
        return max(_status_bytes("VmHWM") or _high_water(), self.baseline)

    def summary(self, *, evaluation: int) -> dict[str, int | str]:
        """The entry on memory of `summary.json`: bytes before the first forward, at the given peak, at the present peak."""
        return {"loaded": self.baseline, "evaluation": evaluation, "training": self.peak(), "of": self.kind}

    @property
    def kind(self) -> str:
        """What is measured."""
        return "resident set of the process" if self._cuda is None else "CUDA allocator"


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _high_water() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
