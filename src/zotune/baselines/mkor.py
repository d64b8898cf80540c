"""MKOR's update rule (2306.01685)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.baselines.baseline import Setting
from zotune.io.memory_tags import tagged
from zotune.methods.rules.base import BaseRule


def updated_inverse(inverse: Tensor, vector: Tensor, gamma: float) -> Tensor:
    """(γ M + (1 − γ) v vᵀ)⁻¹ of M⁻¹ (d, d), symmetric, and v (d,), by Sherman and Morrison: d² operations and no inversion."""
    product = inverse @ vector
    return (inverse - torch.outer(product, product) * ((1 - gamma) / (gamma + (1 - gamma) * (vector @ product)))) / gamma


def preconditioned(model: nn.Module, max_side: int) -> dict[str, nn.Module]:
    """Linear layers with factors, by the name of their weight: those of sides up to ``max_side`` whose weight no other module uses."""
    used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(module.weight)]: module
        for module in model.modules()
        if isinstance(module, nn.Linear) and used[id(module.weight)] == 1 and max(module.weight.shape) <= max_side
    }


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


class MKOR(BaseRule):
    """SGD with momentum on gradients that Kronecker factors precondition.

    Args:
        setting: what is trained. Hooks on its layers record inputs and output gradients.
        momentum: of SGD.
        gamma: γ, the decay of the factors.
        interval: steps between two updates of the factors.
        stabilizer, threshold: where an entry of an inverse is above the threshold, this share of the identity is mixed in.
        max_side: layers with a larger side go by SGD.
        hybrid: (steps of a window, least gain) of MKOR-H; None for MKOR.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        momentum: float,
        gamma: float,
        interval: int,
        stabilizer: float,
        threshold: float,
        max_side: int,
        hybrid: tuple[int, float] | None,
    ) -> None:
        super().__init__(setting.groups, setting.lr, weight_decay=0.0)
        self.momentum, self.gamma, self.interval = momentum, gamma, interval
        self.stabilizer, self.threshold, self.hybrid = stabilizer, threshold, hybrid
        self.count, self.examples = 0, 1
        self.first_order = False
        self.loss_sum, self.mean_before = 0.0, float("inf")
        self.seen: dict[int, tuple[Tensor, Tensor, int]] = {}  # id of a parameter -> Σ of mean inputs, Σ output gradients, micro-batches
        by_name = {name: key for key, name in setting.names.items()}
        self.hooks = [
            module.register_forward_hook(partial(self._forward, by_name[name]))
            for name, module in preconditioned(setting.model, max_side).items()
            if name in by_name
        ]

    # -- recording in layers ----------------------------------------------------------------------------------------------------------

    @tagged("backward update")
    def _forward(self, key: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        due = not self.first_order and self.count % self.interval == 0
        if due and torch.is_grad_enabled() and module.training and output.requires_grad:
            mean = _wide(args[0]).flatten(0, -2).mean(dim=0)
            # Recorded with the output's gradient: a forward that activation checkpointing repeats has none, and counts once.
            output.register_hook(self._backward(key, mean))

    def _backward(self, key: int, mean: Tensor) -> Callable[[Tensor], None]:
        @tagged("backward update")
        def arrived(gradient: Tensor) -> None:
            total = _wide(gradient).flatten(0, -2).sum(dim=0)
            before = self.seen.get(key)
            self.seen[key] = (mean, total, 1) if before is None else (before[0] + mean, before[1] + total, before[2] + 1)

        return arrived

    def record(self, loss: float, count: int) -> None:
        """Take the step's mean loss, and the number of losses whose sum was differentiated."""
        self.examples = count
        if self.hybrid is None or self.first_order:
            return
        window, least = self.hybrid
        self.loss_sum += loss
        if (self.count + 1) % window == 0:
            mean = self.loss_sum / window
            self.first_order = mean > (1 - least) * self.mean_before
            self.loss_sum, self.mean_before = 0.0, mean

    # -- a step -----------------------------------------------------------------------------------------------------------------------

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.count += 1
        self.seen.clear()

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        direction = self._preconditioned(grad, state, self.seen.get(id(p)))
        if self.momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            direction = state["momentum_buffer"].mul_(self.momentum).add_(direction)
        p.sub_(direction, alpha=group["lr"])

    def _preconditioned(self, gradient: Tensor, state: dict[str, Any], seen: tuple[Tensor, Tensor, int] | None) -> Tensor:
        if self.first_order:
            state.pop("left", None)
            state.pop("right", None)
            return gradient
        if seen is not None:
            if "left" not in state:
                state["left"], state["right"] = (torch.eye(side, dtype=gradient.dtype, device=gradient.device) for side in gradient.shape)
            inputs, outputs, parts = seen
            state["left"] = self._updated(state["left"], outputs / self.examples)
            state["right"] = self._updated(state["right"], inputs / parts)
        if "left" not in state:
            return gradient
        change = state["left"] @ gradient @ state["right"]
        norm = change.norm()
        return change * (gradient.norm() / norm) if norm > 0 else gradient

    def _updated(self, inverse: Tensor, vector: Tensor) -> Tensor:
        inverse = updated_inverse(inverse, vector.to(inverse.dtype), self.gamma)
        if inverse.abs().max() > self.threshold:
            inverse = (1 - self.stabilizer) * inverse
            inverse.diagonal().add_(self.stabilizer)
        return inverse

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def extra_state(self) -> dict[str, Any]:
        """Scalars beside the tensors, for JSON."""
        before = None if self.mean_before == float("inf") else self.mean_before
        return {"count": self.count, "first_order": self.first_order, "loss_sum": self.loss_sum, "mean_before": before}

    def load_extra_state(self, content: dict[str, Any]) -> None:
        """Continue from :meth:`extra_state`."""
        self.count, self.first_order, self.loss_sum = content["count"], content["first_order"], content["loss_sum"]
        self.mean_before = float("inf") if content["mean_before"] is None else content["mean_before"]
