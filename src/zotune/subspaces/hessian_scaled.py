"""Full space with a diagonal metric: directions H^-½ Z, H an estimate of the Hessian's diagonal (HiZOO), whole or factored (HiZOO-L)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.base import Space
from zotune.subspaces.coordinate import Coordinate
from zotune.subspaces.scaled_directions import Factors, ScaledCoordinate


class HessianScaledCoordinate(ScaledCoordinate):
    """θ = W with directions H^-½ Z; H, diagonal, float32, begins at 1.

    H ← (1 − α) H + α (1/K) Σ_k q_k H ⊙ Z_k²,   q_k = |L(θ + εH^-½Z_k) + L(θ − εH^-½Z_k) − 2 L(θ)| / 2ε²
    """

    def __init__(self, name: str, parameter: nn.Parameter, smoothing: float) -> None:
        super().__init__(name, parameter)
        self.smoothing = smoothing
        self.h = torch.ones(self.numel, device=parameter.device)

    def factors(self, seed: int, step: int) -> Factors:
        return lambda part: self.h[part].rsqrt()

    @tagged("directions")
    def update_curvature(self, directions: Directions, curvatures: Sequence[float], seed: int, step: int) -> None:
        """Take in the q_k of a step, once its update has been made."""
        alpha = self.smoothing
        terms = [(Key(seed, step, k, self.name), alpha * q / len(curvatures)) for k, q in enumerate(curvatures)]
        scales = {key: directions.scale(key, self.numel, self.device) for key, _ in terms}

        def take_in(part: slice) -> None:
            h = self.h[part]
            gain = torch.full_like(h, 1 - alpha)
            for key, weight in terms:
                gain.add_(directions.block(key, part, self.device, scales[key]).square_(), alpha=weight)
            h.mul_(gain)

        for_blocks(self.numel, self.device, take_in)

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.h]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"h": self.h}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        self.h.copy_(state["h"].to(self.device))


class FactoredCoordinate(HessianScaledCoordinate):
    """:class:`HessianScaledCoordinate` of a matrix W (m, n) with H_ij = r_i c_j / mean r: r (m,) and c (n,) float32 are all that is kept.

    r_i ← (1 − α) r_i + α (1/K) Σ_k q_k mean_j (H ⊙ Z_k²)_ij,   c_j likewise with the mean over i: Adafactor's factoring.
    """

    def __init__(self, name: str, parameter: nn.Parameter, smoothing: float) -> None:
        super().__init__(name, parameter, smoothing)
        self.rows_of, self.columns = parameter.shape
        self.h = torch.ones(self.rows_of + self.columns, device=parameter.device)  # r, then c

    def factors(self, seed: int, step: int) -> Factors:
        return lambda part: self._curvature(*self._places(part)).rsqrt()

    def _places(self, part: slice) -> tuple[Tensor, Tensor]:
        """Row and column of a block's numbers."""
        places = torch.arange(part.start, part.stop, device=self.device)
        row = torch.div(places, self.columns, rounding_mode="floor")
        return row, places - row * self.columns

    def _curvature(self, row: Tensor, column: Tensor) -> Tensor:
        r, c = self.h[: self.rows_of], self.h[self.rows_of :]
        return r[row] * c[column] / r.mean()

    @tagged("directions")
    def update_curvature(self, directions: Directions, curvatures: Sequence[float], seed: int, step: int) -> None:
        alpha = self.smoothing
        terms = [(Key(seed, step, k, self.name), alpha * q / len(curvatures)) for k, q in enumerate(curvatures)]
        scales = {key: directions.scale(key, self.numel, self.device) for key, _ in terms}
        sums: dict[int, Tensor] = {}

        def take_in(part: slice) -> None:
            row, column = self._places(part)
            found = torch.zeros(len(row), device=self.device)
            for key, weight in terms:
                found.add_(directions.block(key, part, self.device, scales[key]).square_(), alpha=weight)
            found.mul_(self._curvature(row, column))
            mine = torch.zeros_like(self.h)
            mine[: self.rows_of].index_add_(0, row, found, alpha=1 / self.columns)
            mine[self.rows_of :].index_add_(0, column, found, alpha=1 / self.rows_of)
            sums[part.start] = mine

        for_blocks(self.numel, self.device, take_in)
        self.h.mul_(1 - alpha)
        for start in sorted(sums):  # in one order, however many threads there were
            self.h.add_(sums[start])


@dataclass(frozen=True)
class HessianScaled(Space):
    """Every number moves, by directions that an estimate of the Hessian's diagonal scales.

    Args:
        smoothing: α, in [0, 1).
        factored: keep a matrix's H as a row and a column.

    Raises:
        ValueError: it does not lie there.
    """

    smoothing: float = 1e-8
    factored: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing!r}.")

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        kind = FactoredCoordinate if self.factored and parameter.dim() == 2 else HessianScaledCoordinate
        return kind(name, parameter, self.smoothing)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        moving, _ = super().elements(shape)
        return moving, sum(shape) if self.factored and len(shape) == 2 else moving

    def memory(self, update_rule_state: float) -> str:
        return "Σ m + n" if self.factored else f"{1 + update_rule_state:g} × W"
