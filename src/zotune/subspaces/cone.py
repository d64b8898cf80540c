"""Full space with directions in a cone around the momentum of past estimates (ConMeZO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, for_blocks, sum_of_blocks
from zotune.subspaces.base import Subspace
from zotune.subspaces.coordinate import Coordinate, MomentTransport, matching
from zotune.subspaces.scaled_directions import TransformedCoordinate

#: β while the warm-up begins, the part of it in which β stays so, and the curve of its rise to the final one.
FIRST, FLAT, POWER, STEEP = 0.1, 0.1, 1.8, 8.0


class ConeDirections(Directions):
    """along · m + across · Z of other directions Z; for one parameter."""

    dense = False

    def __init__(self, inner: Directions, m: Tensor, along: float, across: float) -> None:
        super().__init__(inner.kind if inner.kind in self.KINDS else "gaussian")
        self.inner, self.m, self.along, self.across = inner, m, along, across
        self._units: dict[Key, float] = {}

    def scale(self, key: Key, numel: int, device: torch.device) -> float:
        self._unit(key)  # before any thread asks for a block
        return 1.0  # the sphere's is that of Z alone

    def _unit(self, key: Key) -> float:
        if key not in self._units:
            self._units[key] = self.across * self.inner.scale(key, self.m.numel(), self.m.device)
        return self._units[key]

    @tagged("directions")
    def block(self, key: Key, part: slice, device: torch.device, scale: float = 1.0) -> Tensor:
        z = self.inner.block(key, part, device, self._unit(key)).add_(self.m[part] * self.along)
        return z if scale == 1.0 else z.mul_(scale)

    @tagged("directions")
    def rows(self, key: Key, rows: Tensor, columns: int) -> Tensor:
        z = self.inner.rows(key, rows, columns).mul_(self._unit(key))
        return z.add_(self.m.view(-1, columns)[rows] * self.along)

    @tagged("directions")
    def draw_many(self, key: Key, count: int, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        return self.inner.draw_many(key, count, shape, device).mul_(self.across).add_(self.m.view(shape) * self.along)


class ConeCoordinate(TransformedCoordinate):
    """θ = W with directions in the cone; m of its elements, float32, starts at 0."""

    def __init__(self, name: str, parameter: nn.Parameter, subspace: Cone) -> None:
        super().__init__(name, parameter)
        self.subspace = subspace
        self.axis = Axis([self])
        self.m = torch.zeros(self.numel, device=parameter.device)

    def transformed(self, directions: Directions, seed: int, step: int) -> Directions:
        along, across = self.axis.along, self.axis.across
        if isinstance(directions, ConeDirections) or not along:
            return directions
        return ConeDirections(directions, self.m, along, across)

    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        if self is self.axis.members[0]:
            self.axis.measure(self.subspace.angle)
        return None

    @tagged("directions")
    def learn(self, directions: Directions, coefficients: Sequence[float], curvatures: Sequence[float], seed: int, step: int) -> None:
        beta, cone = self.subspace.beta_of(step), self.transformed(directions, seed, step)
        terms = [(Key(seed, step, k, self.name), (1 - beta) * c / len(coefficients)) for k, c in enumerate(coefficients) if c]
        moves = [(key, weight * cone.scale(key, self.numel, self.device)) for key, weight in terms]

        def update(part: slice) -> None:
            m = self.m[part]
            found = torch.zeros_like(m)
            cone.add_to(found, part, moves)  # made of the m before
            m.mul_(beta).add_(found)

        for_blocks(self.numel, self.device, update)

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.m]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"m": self.m}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        self.m.copy_(matching(state["m"], self.m, self.name))


class Axis:
    """The momentum of all coordinates together, the axis of a step's cone.

    Attributes:
        members: the coordinates.
        along, across: cos φ √d / ‖m‖ and sin φ, for m and Z of d elements; 0 and 1 where m is 0.
    """

    def __init__(self, members: Sequence[ConeCoordinate]) -> None:
        self.members = list(members)
        self.along, self.across = 0.0, 1.0

    @tagged("directions")
    def measure(self, angle: float) -> None:
        """Set the two numbers for the m's of now, until the next call."""
        squares = math.fsum(_square(member.m) for member in self.members)
        self.along, self.across = 0.0, 1.0
        if squares > 0:
            self.along = math.cos(angle) * math.sqrt(sum(member.numel for member in self.members) / squares)
            self.across = math.sin(angle)


def _square(m: Tensor) -> float:
    return sum_of_blocks(lambda part: m[part].square(), m.numel(), m.device)


@dataclass(frozen=True)
class Cone(Subspace):
    """Every element is trained, along directions within a cone around the momentum m of past estimates.

    Z_k = cos φ √d m / ‖m‖ + sin φ u_k,   u_k ~ N(0, I),   m ← β m + (1 − β) (1/K) Σ c_k Z_k

    Args:
        angle: φ, in (0, π/2].
        beta: β, in [0, 1).
        warm_up: steps in which β rises from 0.1; 0: none.

    Raises:
        ValueError: an argument is out of its range.
    """

    angle: float = 1.35
    beta: float = 0.95
    warm_up: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.angle <= math.pi / 2:
            raise ValueError(f"angle must lie in (0, π/2], not {self.angle!r}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), not {self.beta!r}.")
        if not (isinstance(self.warm_up, int) and self.warm_up >= 0):
            raise ValueError(f"warm_up must be a whole number of at least 0, not {self.warm_up!r}.")

    def beta_of(self, step: int) -> float:
        """β of a step: 0.1 in the first tenth of the warm-up, then rising to the final one."""
        if step >= self.warm_up:
            return self.beta
        past = max(0.0, step / self.warm_up - FLAT) / (1 - FLAT)
        return self.beta - (self.beta - FIRST) / (1 + STEEP * past**POWER) ** 3

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return ConeCoordinate(name, parameter, self)

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        members = [c for c in coordinates if isinstance(c, ConeCoordinate)]
        axis = Axis(members)
        for member in members:
            member.axis = axis
        return 1

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        trained, _ = super().elements(shape)
        return trained, trained

    def memory(self, update_rule_state: float) -> str:
        return f"{1 + update_rule_state:g} × W"
