"""Output gradients behind the final norm of a language model: in the hidden states that its layers add to.

The head reads z = norm(h), and what layers write is added to h. With u = h / rms(h), of which the norm gives the same z,

    δ_u = (∂z/∂u)ᵀ δ_z      (d,),

which is the gradient in h times rms(h), a number for each position. For an RMS norm with the weight g it is g ⊙ δ_z less its part along u.

That z is such a function of h is compared with what the head got, at every evaluation and position. Where it is not (another layer in
between, a model without a final norm), δ_z takes the place of δ_u.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zotune.weights.precision import HALF

#: Largest difference from what the head got, as a part of a position's largest element: rounding, of half precision.
ROUNDING, ROUNDING_HALF = 1e-3, 3e-2
#: Difference of the mean of u², and of u, from those behind a norm.
NORMED = 1e-2
#: Weights of a norm at most this part of the largest cannot be divided by.
LEAST = 1e-6


class NormedRows(Protocol):
    """The final norm at some positions; ``outputs`` are z (n, d)."""

    outputs: Tensor

    def gives(self, inputs: Tensor) -> Tensor:
        """Whether these inputs of the head (n, d) are the norm's outputs there, each up to a factor: one boolean."""
        ...

    def behind(self, gradients: Tensor) -> Tensor:
        """δ_u (n, d) in float32 of δ_z (n, d)."""
        ...


class ModuleRows:
    """The norm by a module of the model, at its inputs h (n, d), by automatic differentiation of the module's own code alone."""

    def __init__(self, norm: nn.Module, rows: Tensor) -> None:
        rows = rows.detach()
        sizes = rows.float().square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        with torch.enable_grad():
            self.inputs = (rows / sizes.to(rows.dtype)).requires_grad_()
            self.outputs: Tensor = norm.forward(self.inputs)

    def gives(self, inputs: Tensor) -> Tensor:
        made, given = self.outputs.detach().float(), inputs.detach().float()
        if made.shape != given.shape:
            return torch.zeros((), dtype=torch.bool, device=inputs.device)
        factors = (made * given).sum(dim=1, keepdim=True) / made.square().sum(dim=1, keepdim=True).clamp_min(1e-30)
        rounding = ROUNDING_HALF if inputs.dtype in HALF else ROUNDING
        return ((given - factors * made).abs().amax(dim=1) <= rounding * given.abs().amax(dim=1)).all()

    def behind(self, gradients: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.outputs, self.inputs, gradients.to(self.outputs.dtype))
        return found.float()


@dataclass
class ScaledRows:
    """The norm z = g ⊙ u (+ b) of an engine, by z (n, d) at the head.

    Attributes:
        outputs: z.
        weight: g (d,), float32.
        bias: b (d,) of a layer norm, whose u has the mean 0; None: of an RMS norm.
    """

    outputs: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """u (n, d)."""
        return (self.outputs if self.bias is None else self.outputs - self.bias) / self.weight

    def gives(self, inputs: Tensor) -> Tensor:
        if inputs.shape != self.outputs.shape or bool((self.weight.abs() <= LEAST * self.weight.abs().amax()).any()):
            return torch.zeros((), dtype=torch.bool)
        u = self.inputs
        normed = (u.square().mean(dim=1) - 1).abs().amax() <= NORMED
        return normed if self.bias is None else normed & (u.mean(dim=1).abs().amax() <= NORMED)

    def behind(self, gradients: Tensor) -> Tensor:
        scaled, u = gradients.float() * self.weight, self.inputs
        scaled = scaled - u * (u * scaled).mean(dim=1, keepdim=True)
        return scaled if self.bias is None else scaled - scaled.mean(dim=1, keepdim=True)


_norms: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


@contextmanager
def observing_norm(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Within, ``recorder`` gets the final norm of each forward of a model, where it may have one."""

    def observe(norm: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        rows = recorder.scored_rows(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() == 3 else None
        if rows is not None:
            recorder.norm_called(ModuleRows(norm, rows))

    handles = [norm.register_forward_hook(observe) for norm in _candidates(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _candidates(model: nn.Module) -> list[nn.Module]:
    """Modules with one vector as their weight outside of the repeated blocks; the one called last may be the final norm."""
    if model not in _norms:
        _norms[model] = [module for module in _outside_blocks(model) if _is_vector(module._parameters.get("weight"))]
    return _norms[model]


def _outside_blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield child
            yield from _outside_blocks(child)


def _is_vector(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() == 1
