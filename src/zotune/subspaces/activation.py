"""Low rank with V from activations: the leading subspace of a layer's inputs, now (AGZO) or when training began (ZO-Act)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key
from zotune.subspaces.base import Losses
from zotune.subspaces.coordinate import Coordinate, MomentTransport
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate
from zotune.subspaces.projected import orthonormal
from zotune.weights.layouts import is_outputs_first

#: Iterations of the power iteration, and its oversampling: vectors beyond the rank.
ITERATIONS, OVERSAMPLING = 3, 16


class ActivationCoordinate(LowRankCoordinate):
    """θ = A of W + A Vᵀ, V = √n times the r leading right singular vectors of the layer's inputs x (rows, n), in bfloat16.

    The gradient of a Linear is GᵀX for some G, so its rows lie in the span of the inputs; V loses little of it where the inputs have few
    large singular values. √n gives V's columns the size of LOZO's. A layer without observed inputs has LOZO's V.

    Attributes:
        from_data: whether V is made from inputs.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int) -> None:
        super().__init__(name, parameter, rank, interval)
        self.from_data = False

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        observed, self.observed = self.observed, None
        self.from_data = observed is not None
        if observed is None:
            return super().redraw(seed, redraw)
        old = self.v
        self.v = self._row_major(observed.to(self.device, torch.float32))
        transport = old.T @ self.v / self.v.shape[0]
        return lambda moment: moment @ transport

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"v": self.v.bfloat16().contiguous()} if self.from_data else {})

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.observed = state.get("v")
        super().load_state(state, seed, step)


@dataclass(frozen=True)
class Activation(LowRank):
    """``LowRank`` with V of Linear layers from their inputs in the step that redraws V."""

    kind = ActivationCoordinate

    def needs_data(self, step: int) -> bool:
        return step % self.interval == 0

    @tagged("directions")
    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        """V of every Linear layer that the losses run, bfloat16, by name."""
        wanted = {id(c.parameter): c for c in coordinates if isinstance(c, ActivationCoordinate)}
        sketches: dict[str, Tensor] = {}

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            name = wanted[id(module.weight)].name
            if args and isinstance(args[0], Tensor):
                key = Key(seed, step, 0, name, "inputs")
                sketches[name] = sketch(args[0].detach().flatten(0, -2), self.rank, key, sketches.get(name))

        owners = [m for m in model.modules() if id(m._parameters.get("weight")) in wanted and is_outputs_first(m)]
        with observing_inputs(owners, record):
            for _ in losses():
                pass
        return {name: self.basis(found) for name, found in sketches.items()}

    def basis(self, found: Tensor) -> Tensor:
        """V of a sketch of the inputs, bfloat16, (n, rank)."""
        v = _leading(found, self.rank)
        return (math.sqrt(v.shape[0]) * v).bfloat16().contiguous()


class InitialActivationCoordinate(ActivationCoordinate):
    """θ = C of W + C Vᵀ, V the r leading right singular vectors of the layer's inputs in the first step, of length 1, in bfloat16.

    A layer without observed inputs has an orthonormal basis of a random subspace.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int = 0) -> None:
        super().__init__(name, parameter, rank, interval=0)  # drawn once

    def core_rate(self, rank: int) -> float:
        return 1.0

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        if self.observed is not None:
            return super().redraw(seed, redraw)
        self.from_data = False
        self.v = self._row_major(orthonormal(self._gaussian(seed, redraw, "subspace", self.v.shape)))
        return None


@dataclass(frozen=True)
class InitialActivation(Activation):
    """``LowRank`` with an orthonormal V from the inputs of the first step, the same for the whole run (ZO-Act, 2607.01125)."""

    rank: int = 8
    interval: int = 1  # not used: nothing is redrawn

    kind = InitialActivationCoordinate

    def needs_data(self, step: int) -> bool:
        return step == 0

    def basis(self, found: Tensor) -> Tensor:
        return _leading(found, self.rank).bfloat16().contiguous()


@contextmanager
def observing_inputs(modules: Iterable[nn.Module], observe: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block, call ``observe(module, args)`` with the inputs of each of the modules."""
    handles = [module.register_forward_pre_hook(observe) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@tagged("directions")
def sketch(x: Tensor, rank: int, key: Key, before: Tensor | None = None) -> Tensor:
    """A few rows S with SᵀS ≈ xᵀx (+ that of the rows ``before``), float64 on the CPU, (rank + :data:`OVERSAMPLING`, n) or fewer.

    By power iteration Q ← QR(xᵀ x Q) from a keyed Gaussian, two thin products each; exact for no more rows or columns than that.
    """
    x = x.float()
    width = min(rank + OVERSAMPLING, x.shape[1])
    q = orthonormal(Directions("gaussian").draw(key, (x.shape[1], width), x.device))
    for _ in range(ITERATIONS):
        q = orthonormal(x.T @ (x @ q))
    y = (x @ q).double().cpu()
    squares, vectors = torch.linalg.eigh(y.T @ y)
    rows = squares.clamp_min(0).sqrt().unsqueeze(1) * (q.double().cpu() @ vectors).T
    if before is not None:
        rows = torch.cat([before, rows])
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return (sizes.unsqueeze(1) * right)[:width]


@tagged("directions")
def _leading(found: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of a sketch, their largest element positive, (n, rank)."""
    _, _, right = torch.linalg.svd(found, full_matrices=False)
    return positive_peaks(right[:rank].T)


def positive_peaks(v: Tensor) -> Tensor:
    """v with the signs of its columns, free in singular vectors, such that each column's largest element is positive."""
    peak = v.gather(0, v.abs().argmax(dim=0, keepdim=True))
    return v * torch.where(peak < 0, -1.0, 1.0)
