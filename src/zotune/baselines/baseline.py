"""A baseline: a method that calls backward, or that trains nothing, with what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

#: A backward pass costs as much as two forward passes.
BACKWARD = 2


class Setting(NamedTuple):
    """What an optimizer is built from.

    Attributes:
        model: the model, for hooks on its layers.
        names: of the parameters, by id.
        groups: parameter groups, ``{"params", "weight_decay"}``; float32 copies stand in for half-precision parameters.
        lr: learning rate.
        last: ids of the parameters of the last layer (the head).
        seed: for a method that draws random numbers.
        max_steps: steps of the run; None where unknown.
        owners: the model's own parameter behind each of the groups' (itself, but for float32 copies), by id.
    """

    model: nn.Module
    names: Mapping[int, str]
    groups: list[dict[str, Any]]
    lr: float
    last: frozenset[int]
    seed: int
    max_steps: int | None
    owners: Mapping[int, nn.Parameter]


def nothing_kept(shape: Sequence[int], last: bool) -> int:
    """No state."""
    return 0


def takes_all(model: nn.Module, trained: Mapping[str, tuple[int, ...]]) -> None:
    """No refusal."""


@dataclass(frozen=True)
class Baseline:
    """A method that zeroth-order methods are compared with.

    Args:
        name: the method's one name.
        title: what to call it in a table.
        arxiv: id of the paper; empty where there is none.
        lr: default learning rate; None for a method without one.
        kind: ``"backward"``: trained by gradients; ``"fit"``: a probe fitted on features; ``"evaluate"``: nothing is trained.
        build: makes the torch optimizer of a :class:`Setting`; None for a method without one.
        kept: (shape, of the last layer?) -> float32 elements of state per parameter of that shape.
        memory: the same as text.
        curvature: whether the optimizer takes a Hutchinson estimate of the Hessian's diagonal.
        blocks: backprop goes through this many of the last blocks, and everything before them is trained by forward passes; 0: through all.
        eps: the perturbation scale ε of what is trained by forward passes.
        zo_lr: its learning rate.
        package: a package it needs.
        refusal: (model, shapes of trained parameters by name) -> why it cannot be used there, or None.
        options: the recipe's keyword arguments, for reports.
    """

    name: str
    title: str
    arxiv: str
    lr: float | None = None
    kind: Literal["backward", "fit", "evaluate"] = "backward"
    build: Callable[[Setting], torch.optim.Optimizer] | None = field(default=None, compare=False)  # name and options say which
    kept: Callable[[Sequence[int], bool], int] = field(default=nothing_kept, compare=False)
    memory: str = "none"
    curvature: bool = False
    blocks: int = 0
    eps: float = 1e-3
    zo_lr: float = 0.0
    package: str | None = None
    refusal: Callable[[nn.Module, Mapping[str, tuple[int, ...]]], str | None] = field(default=takes_all, compare=False)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def forwards_per_step(self) -> int:
        """Cost of a step in forward passes of the batch; a backward pass counts as two, one through forward and backward as four.

        Two forwards and at most two backward passes where backprop goes through some blocks only.
        """
        if self.kind != "backward":
            return 0
        if self.blocks:
            return 2 + 2 * BACKWARD
        return 1 + BACKWARD + (2 * BACKWARD if self.curvature else 0)

    def state_bytes(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        last: frozenset[str] = frozenset(),
        half: bool = False,
        deep: Collection[str] | None = None,
    ) -> int:
        """Bytes of state between steps beyond the weights, for trainable parameters of these shapes, without gradients and activations.

        Half-precision weights have a float32 copy. Where only the parameters named in ``deep`` are trained by their gradients, the others
        have a 16-bit residual in half precision and nothing else.
        """
        total = 0
        for name, shape in shapes.items():
            if deep is None or name in deep:
                total += 4 * (self.kept(shape, name in last) + (math.prod(shape) if half else 0))
            elif half:
                total += 2 * math.prod(shape)
        return total

    @property
    def extra_memory(self) -> str:
        """State between steps beyond the weights, and what a step needs besides, as text."""
        if self.kind != "backward":
            return self.memory
        part = "of the last blocks" if self.blocks else ""
        return f"{self.memory}; in a step: 1 × W, activations {part}".rstrip()
