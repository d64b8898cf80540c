"""Full space with a diagonal metric: directions H^-½ Z, H an estimate of the Hessian's diagonal (HiZOO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.coordinates import Coordinate
from zotune.directions import Directions, Key, for_blocks
from zotune.subspaces.shaped import Factors, ShapedCoordinate
from zotune.subspaces.subspace import Space


class CurvedCoordinate(ShapedCoordinate):
    """θ = W with directions H^-½ Z; H, diagonal, float32, begins at 1.

    H ← (1 − α) H + α (1/K) Σ_k q_k H ⊙ Z_k²,   q_k = |L(θ + εH^-½Z_k) + L(θ − εH^-½Z_k) − 2 L(θ)| / 2ε²
    """

    def __init__(self, name: str, parameter: nn.Parameter, smoothing: float) -> None:
        super().__init__(name, parameter)
        self.smoothing = smoothing
        self.h = torch.ones(self.numel, device=parameter.device)

    def factors(self, seed: int, step: int) -> Factors:
        return lambda part: self.h[part].rsqrt()

    def learn(self, directions: Directions, curvatures: Sequence[float], seed: int, step: int) -> None:
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


@dataclass(frozen=True)
class Curved(Space):
    """Every number moves, by directions that an estimate of the Hessian's diagonal scales.

    Args:
        smoothing: α, in [0, 1).

    Raises:
        ValueError: it does not lie there.
    """

    smoothing: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing!r}.")

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return CurvedCoordinate(name, parameter, self.smoothing)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        moving, _ = super().elements(shape)
        return moving, moving

    def memory(self, rule_state: float) -> str:
        return f"{1 + rule_state:g} × W"
