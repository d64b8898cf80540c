"""Layouts of matrix layers: how wide their inputs and outputs are, and which of the two the rows of the weight belong to.

A layer type states its layout in its file of ``forward.layers``, which registers a reader here; subspaces that are built from what layers
see ask :func:`layout_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """The layout of one matrix layer.

    Attributes:
        inputs: width n of what it is given.
        outputs: width m of what it returns.
        outputs_first: True for a weight (m, n), y = x Wᵀ; False for (n, m), y = x W (GPT-2's ``Conv1D``).
    """

    inputs: int
    outputs: int
    outputs_first: bool


Reader = Callable[[nn.Module], Layout | None]
_READERS: list[Reader] = []


def register_layout(reader: Reader) -> None:
    """Let :func:`layout_of` ask ``reader``, before those that are registered; it returns None for modules of other types."""
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
    """The width of what a layer may add to the residual stream; None if it adds nothing: it is wider than its input, or no matrix layer."""
    layout = layout_of(module)
    return layout.outputs if layout is not None and layout.outputs <= layout.inputs else None
