"""Projected subspaces: orthonormal bases on one side or both, and a fixed basis of rank-one matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.subspaces.base import at_least_one
from zotune.subspaces.coordinate import MomentTransport
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate, times


@tagged("directions")
def orthonormal(gaussian: Tensor) -> Tensor:
    """Q of the QR decomposition of a Gaussian matrix (..., n, r), its columns' signs such that Q is uniformly distributed; float32.

    On the CPU in float64 whatever the device, so that all devices agree to the last bit.
    """
    q, r = torch.linalg.qr(gaussian.double().cpu())
    return (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)).float().to(gaussian.device)


class TwoSidedCoordinate(LowRankCoordinate):
    """θ = S (r, r) of W + σ P S Qᵀ, P (m, r) and Q (n, r) orthonormal, σ = √(mn) / r (SubZero, 2410.08989).

    σ makes the perturbation of S ~ N(0, 1) as large as a Gaussian one of the whole matrix, E‖σ P S Qᵀ‖² = mn, and the estimate unbiased:
    σ² E[P Pᵀ G Q Qᵀ] = σ² (r/m) (r/n) G = G.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int) -> None:
        super().__init__(name, parameter, rank, interval)
        view = self.matrices
        self.sigma = math.sqrt(view.rows * view.columns) / rank
        self.p = torch.zeros(*view.stack, view.rows, rank, device=parameter.device)  # σ P

    def core_shape(self, moving: int, rank: int) -> tuple[int, ...]:
        return rank, rank

    def core_rate(self, rank: int) -> float:
        return 1.0

    @tagged("directions")
    def expand(self, core: Tensor) -> Tensor:
        return self.p @ core

    def bases(self, seed: int, redraw: int) -> tuple[Tensor, Tensor]:
        """P and Q of an interval."""
        p = orthonormal(self._gaussian(seed, redraw, "left", self.p.shape))
        return p, orthonormal(self._gaussian(seed, redraw, "subspace", self.v.shape))

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        p, q = self.p, self.v
        left, right = self.bases(seed, redraw)
        self.p, self.v = left.mul_(self.sigma), self._row_major(right)
        left, right = self.p.mT @ p / self.sigma**2, q.mT @ self.v
        return lambda moment: left @ moment @ right

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.p]


@dataclass(frozen=True)
class TwoSided(LowRank):
    """``LowRank`` with W + σ P S Qᵀ: orthonormal P and Q, redrawn every ``interval`` steps, and σ = √(mn) / r."""

    kind = TwoSidedCoordinate

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return self.rank**2, self.rank * (rows + columns + self.rank)

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·(m + n + r)" + times(update_rule_state, "r²")


class LeftCoordinate(LowRankCoordinate):
    """θ = uᵀ (n, r) of W + P u, P (m, r) orthonormal (ZO-Muon, 2602.17155).

    The gradient in u is PᵀG: the part of G in the span of P, on average r/m of it.
    """

    transposed = True

    def core_rate(self, rank: int) -> float:
        return 1.0

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        old = self.v
        self.v = self._row_major(orthonormal(self._gaussian(seed, redraw, "subspace", self.v.shape)))
        transport = old.mT @ self.v
        return lambda moment: moment @ transport


@dataclass(frozen=True)
class Left(LowRank):
    """``LowRank`` with W + P u: orthonormal P (m, r), redrawn every ``interval`` steps."""

    kind = LeftCoordinate

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return columns * self.rank, (rows + columns) * self.rank

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·(m + n)" + times(update_rule_state, "r·n")


class RankOnesCoordinate(LowRankCoordinate):
    """θ = τ (r,) of W + U diag(τ) Vᵀ, U (m, r) and V (n, r) ~ N(0, 1), the same for the whole run (TeZO, 2501.19057)."""

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, interval: int = 0) -> None:
        super().__init__(name, parameter, rank, interval=0)  # drawn once
        self.u = torch.zeros(*self.matrices.stack, self.matrices.rows, rank, device=parameter.device)

    def core_shape(self, moving: int, rank: int) -> tuple[int, ...]:
        return (rank,)

    @tagged("directions")
    def expand(self, core: Tensor) -> Tensor:
        return core.unsqueeze(-2) * self.u

    def redraw(self, seed: int, redraw: int) -> MomentTransport | None:
        self.u = self._gaussian(seed, redraw, "left", self.u.shape)
        self.v = self._row_major(self._gaussian(seed, redraw, "subspace", self.v.shape))
        return None

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.u]


@dataclass(frozen=True)
class RankOnes(LowRank):
    """``LowRank`` with W + U diag(τ) Vᵀ: ``rank`` rank-one matrices, drawn once."""

    rank: int = 64
    interval: int = 1  # not used: nothing is redrawn

    kind = RankOnesCoordinate

    def __post_init__(self) -> None:
        at_least_one("rank", self.rank)

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return self.rank, self.rank * (rows + columns + 1)

    def memory(self, update_rule_state: float) -> str:
        return "Σ r·(m + n + 1)" + times(update_rule_state, "r")
