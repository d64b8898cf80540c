"""Low rank with V from data: the leading subspace of what a layer is given (AGZO)."""

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
from zotune.subspaces.coordinate import Coordinate, MomentTransport
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate
from zotune.subspaces.projected import orthonormal
from zotune.weights.layouts import is_outputs_first

#: Rounds of the power iteration, and how many vectors more than are wanted it carries along.
ROUNDS, SPARE = 3, 16


class ActivationCoordinate(LowRankCoordinate):
    """θ = A of W + A Vᵀ, V = √n times the r leading right singular vectors of the layer's inputs x (rows, n), in bfloat16.

    The gradient of a Linear is GᵀX for some G, so its rows lie in the span of the inputs; what V leaves out of it is small where the
    inputs have few large singular values. √n gives V's columns the size of LOZO's. A layer that was not seen has LOZO's V.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int) -> None:
        super().__init__(name, parameter, rank, interval)
        self.seen = False  # whether V is of inputs

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        observed, self.observed = self.observed, None
        self.seen = observed is not None
        if observed is None:
            return super().redraw(seed, redraw)
        old = self.v
        self.v = self._laid_out(observed.to(self.device, torch.float32))
        transport = old.T @ self.v / self.v.shape[0]
        return lambda moment: moment @ transport

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"v": self.v.bfloat16().contiguous()} if self.seen else {})

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.observed = state.get("v")
        super().load_state(state, seed, step)


@dataclass(frozen=True)
class Activation(LowRank):
    """Matrices of Linear layers move as W + A Vᵀ, V from the inputs of the step at which it is renewed; all else as in ``LowRank``.

    Args:
        rank: r.
        interval: steps between two redraws of V.

    Raises:
        ValueError: either is below 1.
    """

    def factored(self, name: str, parameter: nn.Parameter) -> LowRankCoordinate:
        return ActivationCoordinate(name, parameter, self.rank, self.interval)

    def needs_data(self, step: int) -> bool:
        return step % self.interval == 0

    @tagged("directions")
    def observe(
        self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Callable[..., Iterator[Tensor]], seed: int, step: int
    ) -> dict[str, Tensor]:
        """V of every Linear layer that the losses run, bfloat16, by name."""
        wanted = {id(c.parameter): c for c in coordinates if isinstance(c, ActivationCoordinate)}
        sketches: dict[str, Tensor] = {}

        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            coordinate = wanted[id(module.weight)]
            if args and isinstance(args[0], Tensor):
                key = Key(seed, step, 0, coordinate.name, "inputs")
                sketches[coordinate.name] = sketch(args[0].detach().flatten(0, -2), self.rank, key, sketches.get(coordinate.name))

        owners = [m for m in model.modules() if id(m._parameters.get("weight")) in wanted and is_outputs_first(m)]
        with given(owners, watch):
            for _ in losses():
                pass
        return {name: _spread(found, self.rank) for name, found in sketches.items()}


@contextmanager
def given(modules: Iterable[nn.Module], look: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """For the length of a block, ``look(module, args)`` at what each of the modules is given."""
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leading_inputs(x: Tensor, rank: int, key: Key) -> Tensor:
    """√n times the leading right singular vectors of x (rows, n), bfloat16, (n, rank)."""
    return _spread(sketch(x, rank, key), rank)


@tagged("directions")
def sketch(x: Tensor, rank: int, key: Key, before: Tensor | None = None) -> Tensor:
    """A few rows S with SᵀS ≈ xᵀx (+ those of the rows ``before``), float64 on the CPU, (rank + :data:`SPARE`, n) or fewer.

    By power iteration Q ← QR(xᵀ x Q) from a keyed Gaussian, two thin products a round; exact where there are no more rows or columns.
    """
    x = x.float()
    width = min(rank + SPARE, x.shape[1])
    q = orthonormal(Directions("gaussian").draw(key, (x.shape[1], width), x.device))
    for _ in range(ROUNDS):
        q = orthonormal(x.T @ (x @ q))
    y = (x @ q).double().cpu()
    squares, vectors = torch.linalg.eigh(y.T @ y)
    rows = squares.clamp_min(0).sqrt().unsqueeze(1) * (q.double().cpu() @ vectors).T
    if before is not None:
        rows = torch.cat([before, rows])
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return (sizes.unsqueeze(1) * right)[:width]


@tagged("directions")
def _spread(found: Tensor, rank: int) -> Tensor:
    """√n times the leading right singular vectors of a sketch, their largest number positive, bfloat16, (n, rank)."""
    _, _, right = torch.linalg.svd(found, full_matrices=False)
    v = positive_peaks(right[:rank].T)
    return (math.sqrt(v.shape[0]) * v).bfloat16().contiguous()


def positive_peaks(v: Tensor) -> Tensor:
    """v with the signs of its columns, which singular vectors leave open, such that each one's largest number is positive."""
    peak = v.gather(0, v.abs().argmax(dim=0, keepdim=True))
    return v * torch.where(peak < 0, -1.0, 1.0)
