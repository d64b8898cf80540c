"""Full space with directions H^-½ Z, H an estimate of the Hessian's diagonal, whole (HiZOO) or factored (HiZOO-L)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.base import Subspace
from zotune.subspaces.coordinate import Coordinate, matching
from zotune.subspaces.scaled_directions import Factors, ScaledCoordinate


class HessianScaledCoordinate(ScaledCoordinate):
    """θ = W with directions H^-½ Z; H, diagonal, float32, starts at 1.

    H ← (1 − α) H + α (1/K) Σ_k q_k H ⊙ Z_k²,   q_k = |L(θ + εH^-½Z_k) + L(θ − εH^-½Z_k) − 2 L(θ)| / 2ε²

    Attributes:
        renew_first: whether H is updated before the step's update of θ.
    """

    def __init__(self, name: str, parameter: nn.Parameter, smoothing: float, renew_first: bool = False) -> None:
        super().__init__(name, parameter)
        self.smoothing, self.renew_first = smoothing, renew_first
        self.h = torch.ones(self.numel, device=parameter.device)

    def factors(self, seed: int, step: int) -> Factors:
        return lambda part: self.h[part].rsqrt()

    @tagged("directions")
    def learn(self, directions: Directions, coefficients: Sequence[float], curvatures: Sequence[float], seed: int, step: int) -> None:
        add_squares = self._squares(directions, curvatures, seed, step)

        def update(part: slice) -> None:
            h = self.h[part]
            h.mul_(add_squares(torch.full_like(h, 1 - self.smoothing), part))

        for_blocks(self.numel, self.device, update)

    def _squares(self, directions: Directions, curvatures: Sequence[float], seed: int, step: int) -> Callable[[Tensor, slice], Tensor]:
        """A function that adds α (1/K) Σ_k q_k Z_k² of a block to a tensor, in place."""
        terms = [(Key(seed, step, k, self.name), self.smoothing * q / len(curvatures)) for k, q in enumerate(curvatures)]
        scales = {key: directions.scale(key, self.numel, self.device) for key, _ in terms}

        def add(total: Tensor, part: slice) -> Tensor:
            for key, weight in terms:
                total.add_(directions.block(key, part, self.device, scales[key]).square_(), alpha=weight)
            return total

        return add

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.h]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"h": self.h}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        self.h.copy_(matching(state["h"], self.h, self.name))


class FactoredCoordinate(HessianScaledCoordinate):
    """:class:`HessianScaledCoordinate` of a matrix W (m, n) with H_ij = r_i c_j / mean r; only r (m,) and c (n,), float32, are kept.

    r_i ← (1 − α) r_i + α (1/K) Σ_k q_k mean_j (H ⊙ Z_k²)_ij,   c_j likewise with the mean over i: Adafactor's factoring.
    """

    def __init__(self, name: str, parameter: nn.Parameter, smoothing: float, renew_first: bool = False) -> None:
        super().__init__(name, parameter, smoothing, renew_first)
        self.num_rows, self.num_columns = parameter.shape
        self.h = torch.ones(self.num_rows + self.num_columns, device=parameter.device)  # r, then c

    def factors(self, seed: int, step: int) -> Factors:
        return lambda part: self._curvature(*self._positions(part)).rsqrt()

    def _positions(self, part: slice) -> tuple[Tensor, Tensor]:
        """Row and column of a block's elements."""
        elements = torch.arange(part.start, part.stop, device=self.device)
        row = torch.div(elements, self.num_columns, rounding_mode="floor")
        return row, elements - row * self.num_columns

    def _curvature(self, row: Tensor, column: Tensor) -> Tensor:
        r, c = self.h[: self.num_rows], self.h[self.num_rows :]
        return r[row] * c[column] / r.mean()

    @tagged("directions")
    def learn(self, directions: Directions, coefficients: Sequence[float], curvatures: Sequence[float], seed: int, step: int) -> None:
        add_squares = self._squares(directions, curvatures, seed, step)
        sums: dict[int, Tensor] = {}

        def update(part: slice) -> None:
            row, column = self._positions(part)
            found = add_squares(torch.zeros(len(row), device=self.device), part)
            found.mul_(self._curvature(row, column))
            block = torch.zeros_like(self.h)
            block[: self.num_rows].index_add_(0, row, found, alpha=1 / self.num_columns)
            block[self.num_rows :].index_add_(0, column, found, alpha=1 / self.num_rows)
            sums[part.start] = block

        for_blocks(self.numel, self.device, update)
        self.h.mul_(1 - self.smoothing)
        for start in sorted(sums):  # one order for any number of threads
            self.h.add_(sums[start])


@dataclass(frozen=True)
class HessianScaled(Subspace):
    """Every element is trained, along directions scaled by an estimate of the Hessian's diagonal.

    Args:
        smoothing: α, in [0, 1).
        factored: keep a matrix's H as a row and a column.
        renew_first: update H before the step's update of θ, not after it.

    Raises:
        ValueError: smoothing is outside [0, 1).
    """

    smoothing: float = 1e-8
    factored: bool = False
    renew_first: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing!r}.")

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        kind = FactoredCoordinate if self.factored and parameter.dim() == 2 else HessianScaledCoordinate
        return kind(name, parameter, self.smoothing, self.renew_first)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        trained, _ = super().elements(shape)
        return trained, sum(shape) if self.factored and len(shape) == 2 else trained

    def memory(self, update_rule_state: float) -> str:
        return "Σ m + n" if self.factored else f"{1 + update_rule_state:g} × W"
