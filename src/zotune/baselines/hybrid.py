"""Backprop through a model's last blocks, forward passes alone for all before them: :class:`Hybrid` (ZO-Bench's hybrid, 2402.11592)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.baselines.baseline import BACKWARD, Baseline
from zotune.baselines.first_order import FirstOrder, LossFunction, add, checked
from zotune.baselines.split_check import refusal
from zotune.io.memory_tags import tagged
from zotune.methods import mezo
from zotune.methods.estimators import ESTIMATORS
from zotune.optim.journal_records import StepRecord
from zotune.optim.optimizer import ZerothOrder
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.subspaces.coordinate import Offset
from zotune.weights.structure import blocks_of, last_blocks, module_mode


class Hybrid(FirstOrder):
    """The last blocks of a model by their gradient, everything before them by a central difference, from the same two forwards.

    c = (L(θ + εZ, φ) − L(θ − εZ, φ)) / 2ε,   θ ← θ − η_θ c Z,   g = ½ (∇_φ L(θ + εZ, φ) + ∇_φ L(θ − εZ, φ)) to the update rule of φ

    φ: the trained weights of the last ``method.blocks`` blocks and of a head of its own; θ: all others. The weights of θ are overridden, so
    autograd sees nothing before the first weight of φ and stores no activations there. Forwards run in evaluation mode: both points
    must evaluate the same function. A gradient is not a few coefficients, so there is no journal; a run resumes from its checkpoint.

    Args:
        model, method, ...: as for :class:`FirstOrder`; ``lr`` and ``max_grad_norm`` are those of φ. θ has a parameter group of its own,
            the last one, with the rate ``method.zo_lr``; schedulers scale it like the others.

    Raises:
        ValueError: nothing is trained in the last blocks, or nothing before them.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = Hybrid(model, "hybrid", lr=0.1)
        >>> loss = optimizer.step(lambda x: model(x).square().mean(dim=1), torch.ones(4, 3))
    """

    def __init__(self, model: nn.Module, *args: Any, **settings: Any) -> None:
        super().__init__(model, *args, **settings)
        before = [p for name, p in model.named_parameters() if p.requires_grad and name not in self.parameters]
        matrices, vectors = [p for p in before if p.dim() > 1], [p for p in before if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.shallow = ZerothOrder(
            model,
            mezo(eps=self.method.eps),
            self.method.zo_lr,
            params=[group for group in groups if group["params"]],
            seed=self.seed,
            forward_batching="sequential",
        )
        self.eps = self.method.eps
        self._found: StepRecord | None = None
        self._blocks = len(blocks_of(model))
        self.inner.add_param_group({"params": [], "lr": self.method.zo_lr, "weight_decay": 0.0})  # so that a scheduler sets it

    def trained(self) -> dict[str, nn.Parameter]:
        super().trained()
        reason = refusal(self.model, self.method.blocks)
        if reason is not None:
            raise ValueError(f"{self.method.name}: {reason}.")
        deep = frozenset(last_blocks(self.model, self.method.blocks))
        return {name: p for name, p in self.model.named_parameters() if name in deep}

    @tagged("backward update")
    def step(self, loss_fn: LossFunction, batch: Any) -> Tensor:  # type: ignore[override]
        parts = batch if isinstance(batch, list) else [batch]
        parameters = list(self.parameters.values())
        gradients: list[Tensor | None] = [None] * len(parameters)
        points = []
        for sign in (+1, -1):
            losses = []
            offset = Offset(sign * self.method.eps, self.seed, self.steps, 0)
            for part in parts:
                found = self._at(offset, loss_fn, part)
                add(gradients, [*torch.autograd.grad(found.sum(), parameters, allow_unused=True)])
                losses.append(found.detach().reshape(-1))
            points.append(torch.cat(losses))
        estimate = ESTIMATORS["central"].estimate([point.cpu() for point in points], self.method.eps, 1)
        rate = float(self.param_groups[-1]["lr"])
        self._found = StepRecord(
            self.steps, (rate,) * len(self.shallow.param_groups), estimate.loss, tuple(estimate.coefficients.tolist()), estimate.skipped
        )
        self._count(parts, 2)
        try:
            loss = math.nan if any(estimate.skipped) else estimate.loss
            return self._move(gradients, [None] * len(parameters), loss, 2 * points[0].numel())
        finally:
            self.shallow.forward.drop_directions()

    @property
    def passes(self) -> int:
        """Two forward passes, and two backward passes through some of the blocks; through all of them one counts as two forwards."""
        return 2 + math.ceil(2 * BACKWARD * self.method.blocks / self._blocks)

    def _at(self, offset: Offset, loss_fn: LossFunction, part: Any) -> Tensor:
        """Losses at θ ± εZ with the graph of φ; random draws of the loss are the same at both."""
        forward = self.shallow.forward
        generators = isolated_generators(Key(self.seed, self.steps, 0, "", "loss"), forward.devices)
        with torch.enable_grad(), module_mode(forward.model, training=False), forward.at(offset), generators:
            return checked(loss_fn(part))

    def _inner_step(self, loss: float, curvatures: Sequence[Tensor | None], count: int) -> None:
        super()._inner_step(loss, curvatures, count)
        assert self._found is not None, "a step evaluates before it updates"
        self.shallow.steps = self.steps  # a step that was skipped took no record
        self.shallow.apply(self._found)

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.shallow.remove_hooks()

    # -- state ----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state, shallow = super().state_dict(), self.shallow.state_dict()
        state["state"] |= {_SHALLOW + name: tensor for name, tensor in shallow.pop("state").items()}
        state["baseline"]["shallow"] = shallow
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        tensors: Mapping[str, Tensor] = state_dict.get("state", {})
        deep = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SHALLOW)}
        super().load_state_dict({**state_dict, "state": deep})
        shallow = {name.removeprefix(_SHALLOW): tensor for name, tensor in tensors.items() if name.startswith(_SHALLOW)}
        self.shallow.load_state_dict({"state": shallow, **state_dict["baseline"]["shallow"]})


_SHALLOW = "shallow/"


def optimizer_class(method: Baseline) -> type[FirstOrder]:
    """The optimizer class of a method: :class:`Hybrid` where backprop goes through the last blocks only."""
    return Hybrid if method.blocks else FirstOrder
