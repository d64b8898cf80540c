"""Output gradients behind the transform of a masked language model's head.

Between the last hidden states h and the decoder stand a layer, an activation and a norm, z = T(h). The gradient in h is

    δ_h = (∂T/∂h)ᵀ δ_z,

a vector-Jacobian product of these few layers alone, by torch's automatic differentiation of the model's own code. Nothing of the body is in
its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from zotune.weights.structure import body_of, head_of


class HeadTransform:
    """h and T(h) of one forward.

    Attributes:
        states: h, (R, T, d).
        outputs: T(h) at the scored positions, (R, S, e); None before the head was called.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states if states.requires_grad else states.detach().requires_grad_()
        self.outputs: Tensor | None = None

    def behind(self, gradients: Tensor, kept: Tensor | None, examples: Tensor, positions: Tensor) -> Tensor:
        """δ_h (n, d) in float32 of δ_z (n, e) at the rows ``kept`` of R · S (None: all), of these examples and positions."""
        assert self.outputs is not None
        with torch.enable_grad():
            rows = self.outputs.flatten(0, 1)
            rows = rows if kept is None else rows[kept]
        (found,) = torch.autograd.grad(rows, self.states, gradients.to(rows.dtype), retain_graph=True)
        return found[examples, positions].float() * gradients.ne(0).any(dim=1, keepdim=True)


@contextmanager
def observing_transform(model: nn.Module, found: list[HeadTransform]) -> Iterator[None]:
    """Within, ``found`` is the transform of a masked language model's last forward; it stays empty for others."""
    body, head, enabled = body_of(model), head_of(model), torch.is_grad_enabled()
    if body is None or head is None:
        yield
        return

    def enter(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor):
            return None
        found[:] = [HeadTransform(states)]
        torch.set_grad_enabled(True)
        if isinstance(output, tuple):
            return (found[0].states, *output[1:])
        output = copy(output)
        output["last_hidden_state"] = found[0].states
        return output

    def leave(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        torch.set_grad_enabled(enabled)
        if not found or not args or not isinstance(args[0], Tensor):
            return None
        found[0].outputs = args[0]
        return None if enabled else (args[0].detach(), *args[1:])

    handles = [body.register_forward_hook(enter), head.register_forward_pre_hook(leave)]
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        for handle in handles:
            handle.remove()
