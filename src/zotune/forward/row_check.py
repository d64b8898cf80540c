"""The check that a loss calls the model with the rows of a batched evaluation.

A layer takes a single row for one that all rows share, as a table of positions is. A loss that generates or scores row after row would get
every result at the first point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zotune.errors import NotBatchableError
from zotune.forward.active import active

#: Arguments of a model of transformers that hold its rows.
_ROWS = ("input_ids", "inputs_embeds")


@contextmanager
def rows_checked(model: nn.Module, total: int) -> Iterator[None]:
    """Within the block the model, and models within it, raise NotBatchableError where their rows are none of ``total`` stacked ones."""

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_floating_point() and module is not model:
            first = None  # the images of a model within the model, for one
        for value in (first, *(kwargs.get(name) for name in _ROWS)):
            rows = active().rows or total
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] % rows:
                raise NotBatchableError(f"the loss calls the model with {value.shape[0]} of {rows} rows: call it with all rows of a batch")

    # A wrapper's generate() calls the model within it.
    within = [module for module in model.modules() if module is model or hasattr(module, "get_input_embeddings")]
    handles = [module.register_forward_pre_hook(check, with_kwargs=True) for module in within]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
