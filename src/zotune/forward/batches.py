"""TODO: batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from zotune.errors import NotBatchableError
from zotune.io.memory_tags import tagged
from zotune.rng.transfer import send


def batch_rows(batch: Any) -> int:
    """Examples of a batch: the size of dimension 0 that all its tensors share.

    Raises:
        NotBatchableError: it holds no tensors, or they differ in it.
    """
    sizes = {tensor.shape[0] for tensor in tensors(batch)}
    if len(sizes) != 1:
        what = "holds no tensor" if not sizes else f"holds tensors of {', '.join(map(str, sorted(sizes)))} rows"
        raise NotBatchableError(f"the batch {what}, so its examples cannot be told apart")
    return sizes.pop()


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch that have a dimension 0, in order."""
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@tagged("temporary")
def take(batch: Any, index: Tensor, rows: int) -> Any:
    """The rows ``index`` of a batch of ``rows`` examples, as a batch of the same type.

    Tensors with a dimension 0 are indexed, and so are lists of ``rows`` things that are no tensors; what is neither stays as it is.
    """
    if isinstance(batch, Tensor):
        return batch.index_select(0, send(index, batch.device)) if batch.dim() else batch
    if isinstance(batch, Mapping):
        taken = {key: take(value, index, rows) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return taken
        twin = copy.copy(batch)
        for key, value in taken.items():
            twin[key] = value
        return twin
    if isinstance(batch, (tuple, list)) and tensors(batch):
        parts = [take(part, index, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list) and len(batch) == rows:
        return [batch[row] for row in index.tolist()]
    return batch
