"""Full space with directions whose covariance is the inverse of a rank-one curvature, learned by evolution strategies (LOREN)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.base import Subspace, not_negative, positive
from zotune.subspaces.coordinate import Coordinate, MomentTransport, matching
from zotune.subspaces.matrix_view import matrix_view
from zotune.subspaces.scaled_directions import TransformedCoordinate

GAUSSIAN = Directions("gaussian")


class RankOneDirections(Directions):
    """Z = u − α (ã · u) ã of other directions u, with the covariance (I + ã ãᵀ / ρ)⁻¹; for one parameter.

    ã is a, (n,), repeated for each of m rows. α = 1 / (q (q + √ρ)), q² = ρ + s, s = ‖ã‖². Of every direction the sum of its rows is kept,
    (n,), from which ã · u follows.
    """

    dense = False

    def __init__(self, inner: Directions, a: Tensor, numel: int, damping: float) -> None:
        super().__init__(inner.kind if inner.kind in self.KINDS else "gaussian")
        self.inner, self.a, self.numel, self.num_rows = inner, a, numel, numel // len(a)
        self.square = self.num_rows * float(a.double().square().sum())
        q = math.sqrt(damping + self.square)
        self.alpha = 1 / (q * (q + math.sqrt(damping)))
        self._found: dict[Key, _Found] = {}

    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        self._of(key)  # before any thread asks for a block
        return 1.0

    def along(self, key: Key) -> float:
        """ã · Z = (1 − α s) ã · u."""
        return (1 - self.alpha * self.square) * self._of(key).along

    def column_sums(self, key: Key) -> Tensor:
        """The sum of the rows of Z, (n,)."""
        found = self._of(key)
        return found.sums - self.a * (self.num_rows * self.alpha * found.along)

    def _of(self, key: Key) -> _Found:
        if key not in self._found:
            unit, sums = self.inner.scale(key, self.numel, self.a.device), dict[int, Tensor]()

            def add_up(part: slice) -> None:
                lead, size = part.start % len(self.a), part.stop - part.start
                rows = torch.zeros(-(-(lead + size) // len(self.a)), len(self.a), device=self.a.device)
                rows.view(-1)[lead : lead + size] = self.inner.block(key, part, self.a.device, unit)
                sums[part.start] = rows.sum(dim=0)

            for_blocks(self.numel, self.a.device, add_up)
            total = torch.zeros_like(self.a)
            for start in sorted(sums):  # one order for any number of threads
                total.add_(sums[start])
            self._found[key] = _Found(unit, total, float((total.double() * self.a).sum()))
        return self._found[key]

    @tagged("directions")
    def block(self, key: Key, part: slice, device: torch.device, scale: float = 1.0) -> Tensor:
        found, lead, size = self._of(key), part.start % len(self.a), part.stop - part.start
        repeated = self.a.repeat(-(-(lead + size) // len(self.a)))[lead : lead + size]
        z = self.inner.block(key, part, device, found.unit).sub_(repeated.mul_(self.alpha * found.along))
        return z if scale == 1.0 else z.mul_(scale)

    @tagged("directions")
    def rows(self, key: Key, rows: Tensor, columns: int) -> Tensor:
        found = self._of(key)
        return self.inner.rows(key, rows, columns).mul_(found.unit).sub_(self.a * (self.alpha * found.along))

    @tagged("directions")
    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        z = self.inner.draw_many(key, count, shape, device)
        matrices = z.view(count, self.num_rows, len(self.a))
        sums = matrices.sum(dim=1)
        along = (sums.double() * self.a).sum(dim=1)
        for row, one in enumerate(along.tolist()):
            own = key._replace(direction=key.direction + row)
            self._found[own] = _Found(self.inner.scale(own, self.numel, z.device), sums[row], one)
        matrices.sub_((along * self.alpha).to(z).view(-1, 1, 1) * self.a)
        return z


class _Found(NamedTuple):
    """What is known of a direction u: the factor of its elements, the sum of its rows, and ã · u."""

    unit: float
    sums: Tensor
    along: float


class RankOneCoordinate(TransformedCoordinate):
    """θ = W with directions of covariance (I + ã ãᵀ / ρ)⁻¹; a, float32, is drawn from N(0, I) when training begins."""

    def __init__(self, name: str, parameter: nn.Parameter, subspace: RankOneScaled) -> None:
        super().__init__(name, parameter)
        self.subspace = subspace
        self.a = torch.zeros(self.columns, device=parameter.device)
        self._of: tuple[Directions, RankOneDirections] | None = None  # made from the a of now

    def transformed(self, directions: Directions, seed: int, step: int) -> Directions:
        if isinstance(directions, RankOneDirections):
            return directions
        if self._of is None or self._of[0] is not directions:
            self._of = directions, RankOneDirections(directions, self.a, self.numel, self.subspace.damping)
        return self._of[1]

    @tagged("directions")
    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        self._of = None
        if step == 0:
            self.a.copy_(GAUSSIAN.draw(Key(seed, 0, 0, self.name, "covariance"), self.a.shape, self.device))
        return None

    @tagged("directions")
    def learn(self, directions: Directions, coefficients: Sequence[float], curvatures: Sequence[float], seed: int, step: int) -> None:
        ours, damping, count = self.transformed(directions, seed, step), self.subspace.damping, len(coefficients)
        assert isinstance(ours, RankOneDirections)
        slope = self.a * (ours.num_rows * math.fsum(coefficients) / count / (damping + ours.square))
        for k, c in enumerate(coefficients):
            if c:
                key = Key(seed, step, k, self.name)
                slope.sub_(ours.column_sums(key), alpha=c * ours.along(key) / count / damping)
        self.a.sub_(slope, alpha=self.subspace.rate)
        self._of = None

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.a]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"a": self.a}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        self.a.copy_(matching(state["a"], self.a, self.name))
        self._of = None


@dataclass(frozen=True)
class RankOneScaled(Subspace):
    """Every element is trained, along directions whose covariance is the inverse of a damped rank-one matrix for each parameter.

    p(Z) = N(0, (I + ã ãᵀ / ρ)⁻¹),   a ← a − η_a (1/K) Σ_k c_k ∂ log p(Z_k) / ∂a,   ã: a repeated for each row of a matrix

    Args:
        damping: ρ.
        rate: η_a.

    Raises:
        ValueError: an argument is out of its range.
    """

    damping: float = 0.1
    rate: float = 1e-6

    def __post_init__(self) -> None:
        positive("damping", self.damping)
        not_negative("covariance_lr", self.rate)

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return RankOneCoordinate(name, parameter, self)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        trained, _ = super().elements(shape)
        view = matrix_view(shape)
        return trained, trained if view is None else view.columns

    def memory(self, update_rule_state: float) -> str:
        return f"{update_rule_state:g} × W + Σ n"
