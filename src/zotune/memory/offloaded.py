"""What the steps of a workload need of a device where the model's blocks come and go, for a memory cap (``offloading.cap``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zotune.memory.models import build
from zotune.memory.step import Workload, estimate
from zotune.methods import Method
from zotune.offloading import cap
from zotune.offloading.cap import Needs
from zotune.precision import HALF
from zotune.subspaces import Full


def needs(workloads: Sequence[Workload], *, accelerator: bool, blocks: str | Sequence[str] | None = None) -> Needs:
    """The most that any of these takes beside weights, from :func:`zotune.memory.estimate`; no weight is read or made.

    Args:
        workloads: what is to run with the same model and weights: training, evaluation.
        accelerator: as on a GPU; otherwise as on a CPU.
        blocks: the list of blocks, as in :func:`zotune.offload`.

    Raises:
        ValueError: no blocks are found, or a method makes no sense on the model.
    """
    growth = max((_growth(workload) for workload in workloads), default=1.0)
    most = 0
    for workload in workloads:
        split = estimate(workload, accelerator=accelerator)
        with torch.device("meta"):
            whole, rest, _, _ = cap.sizes(build(workload.config, workload.dtype), blocks)
        travels = (_growth(workload) - 1) * (whole - rest)  # residuals, of which only those of the blocks that are here are in memory
        most = max(most, split.total - split.kinds["weights"] - int(travels))
    return Needs(most, growth)


def _growth(workload: Workload) -> float:
    """How much larger a block is than its weights: in half precision a weight that is written every step has 16 bits more."""
    method = workload.method
    written = isinstance(method, Method) and type(method.subspace) is Full and workload.scheme.scheme == "full"
    return 2.0 if written and workload.dtype in HALF else 1.0
