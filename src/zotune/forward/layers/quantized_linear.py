"""Quantized linear layers (``weights.quantized_linear``): as ``nn.Linear``, but W is never materialized and never written.

The layer's ``weight`` is an empty placeholder; the layer adds the product with a batched ``weight`` to its own product. A matrix that an
engine computes with (``weights.computed_linear``) has its whole product from there, at one point at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.forward.layers.rule import Example, LayerRule, add_product, register
from zotune.subspaces import LowRankCoordinate
from zotune.weights import quantized_linear
from zotune.weights.computed_linear import ComputedLinear as EngineMatrix


class QuantizedLinear(LayerRule):
    """A ``weights.QuantizedLinear``: low-rank coordinates only."""

    writable = False

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, quantized_linear.QuantizedLinear)

    def has_hook(self, module: nn.Module) -> bool:
        return True

    def add_low_rank(self, left: Tensor, right: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return add_product(output, x @ right.to(x.dtype), left.T)

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        return None if coordinate.transposed else coordinate.parameter.shape[1]

    def save_merged(self, module: nn.Module, coordinate: LowRankCoordinate, state_dict: dict[str, Any], name: str) -> None:
        """Save A Vᵀ as additional columns of the layer's own low-rank factors, shrunk as the next fold will."""
        if coordinate.keep != 1.0:
            prefix = name.removesuffix("weight")
            for part in ("left",) if coordinate.anchored else ("left", "factor"):
                state_dict[prefix + part] = state_dict[prefix + part] * coordinate.keep
        for part, more in zip(("left", "right"), coordinate.pending_factors(), strict=True):
            if more is not None:
                part = name.removesuffix("weight") + part
                state_dict[part] = torch.cat([state_dict[part], more], dim=1)

    def is_loaded(self, module: nn.Module, state_dict: Mapping[str, Any], name: str) -> bool:
        return name in state_dict or name.removesuffix("weight") + "left" in state_dict

    def examples(self) -> Iterable[Example]:
        for bits in (8, 4):
            for bias in (True, False):
                yield Example(f"bits={bits}, bias={bias}", partial(_quantized, bits, bias), lambda rows: torch.randn(rows, 3, 96))


def _quantized(bits: int, bias: bool) -> nn.Module:
    return quantized_linear.quantize(nn.Sequential(nn.Linear(96, 80, bias=bias)), bits)


class ComputedLinear(QuantizedLinear):
    """A ``weights.ComputedLinear``: the engine adds the product of its low-rank coordinate."""

    by_engine = True

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, EngineMatrix)

    def shared_width(self, module: nn.Module, coordinate: LowRankCoordinate) -> int | None:
        return None

    def examples(self) -> Iterable[Example]:
        return ()  # its paths are those of an engine


register(QuantizedLinear())
register(ComputedLinear())
