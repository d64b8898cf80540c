"""Forward-mode differentiation: a loss and its derivative along one direction, in one forward and without a graph.

Every weight is overridden by a dual number, W with the tangent Z, and nothing is stored for a backward pass. Z is generated when a module
reads its weight, so only the tangents of one module's weights are in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions
from zotune.subspaces.coordinate import Coordinate, Offset


@tagged("directions")
def dual(coordinate: Coordinate, directions: Directions, offset: Offset) -> Tensor:
    """θ with the direction of ``offset`` as its tangent, inside a dual level."""
    weights = [0.0] * offset.direction + [1.0]
    z = coordinate.weighted(directions, weights, offset.seed, offset.step)
    weight = coordinate.at(directions, None)
    return forward_ad.make_dual(weight, z.to(weight.dtype))


class ForwardMode:
    """Differentiates losses; remembers whether attention needs the kernel-free implementation."""

    def __init__(self) -> None:
        self.math_attention = False

    def derivative(self, function: Callable[[], Any], seeded: Callable[[], AbstractContextManager[None]]) -> tuple[Tensor, Tensor]:
        """(loss, derivative), shapes as ``function`` returns them.

        Args:
            function: the loss of a model whose weights are dual numbers.
            seeded: a context with torch's generators in a fixed state.

        Raises:
            ValueError: something has no forward derivative, or the loss was detached from the weights.
        """
        try:
            return self._once(function, seeded)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            if self.math_attention or "scaled_dot_product" not in str(error):
                remedy = "experts_implementation" if "grouped_mm" in str(error) else "attn_implementation"
                raise ValueError(
                    f"the model uses an operation without a forward derivative ({str(error).splitlines()[0]}); load it with "
                    f"{remedy}='eager', or use a method that needs losses only, such as mezo."
                ) from None
        warnings.warn(
            "this model's attention kernel has no forward derivative: computing attention by plain products instead; results are the "
            "same, and a forward takes more memory.",
            stacklevel=2,
        )
        self.math_attention = True
        return self.derivative(function, seeded)

    @tagged("directions")
    def _once(self, function: Callable[[], Any], seeded: Callable[[], AbstractContextManager[None]]) -> tuple[Tensor, Tensor]:
        attention = sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext()
        with attention, forward_ad.dual_level(), seeded():
            loss, tangent = forward_ad.unpack_dual(torch.as_tensor(function()))
            if tangent is None:
                raise ValueError(
                    "the loss has no derivative: the loss function detaches it or takes it out of torch (.detach(), .item(), numpy); "
                    "return it as computed, or use a method that needs losses only, such as mezo."
                )
            return loss.clone(), tangent.clone()
