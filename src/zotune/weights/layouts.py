"""Layouts of matrix layers: the widths of inputs and outputs, and which of them the rows of the weight belong to.

A layer type's file in ``forward.layers`` registers a reader of its layout; subspaces built from layer inputs call :func:`layout_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """The layout of one matrix layer.

    Attributes:
        inputs: width n of its input.
        outputs: width m of its output.
        outputs_first: True for a weight (m, n), y = x Wᵀ; False for (n, m), y = x W (GPT-2's ``Conv1D``).
    """

    inputs: int
    outputs: int
    outputs_first: bool


Reader = Callable[[nn.Module], Layout | None]
_READERS: list[Reader] = []


def register_layout(reader: Reader) -> None:
    """Have :func:`layout_of` call ``reader`` first; it returns None for modules of other types."""
    _READERS.insert(0, reader)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module; None unless it is a matrix layer of a registered type."""
    for reader in _READERS:
        layout = reader(module)
        if layout is not None:
            return layout
    return None


def is_outputs_first(module: nn.Module) -> bool:
    """Whether the rows of a matrix layer's weight belong to its outputs."""
    layout = layout_of(module)
    return layout is not None and layout.outputs_first


def residual_width(module: nn.Module) -> int | None:
    """The output width of a layer that may write to the residual stream; None if wider than its input, or for other layers."""
    layout = layout_of(module)
    return layout.outputs if layout is not None and layout.outputs <= layout.inputs else None
