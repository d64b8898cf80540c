"""The integers of quantized weights as coordinates, which change by whole numbers (QES)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Directions, Key, uniform_integers
from zotune.subspaces.base import Subspace
from zotune.subspaces.coordinate import Coordinate, MomentTransport, Offset, matching
from zotune.weights.quantized_linear import QuantizedLinear, owner_of

#: Random bits of a uniform number.
_BITS = 24
#: The magnitude that a residual has at most: it grows where a change would leave the range.
_MOST = 1.5


class CodeCoordinate(Coordinate):
    """θ = Q of a :class:`QuantizedLinear`, W = f Q ⊙ s with f and s fixed; Z = δ / σ, δ a whole number for every element (2602.03120).

        δ = ⌊σ u + v⌋, u ~ N(0, 1), v ~ U[0, 1);   0 where Q + δ or Q − δ leaves ±127, of 4 bits ±7
        x = Σ_k weights[k] · Z_k + γ e,   Δ = round(x), 0 where Q + Δ leaves that range,   Q ← Q + Δ,   e ← x − Δ within ±1.5

    e is the residual, in half precision, uniform in [−½, ½) at first. The layer's ``weight``, zeros that take no memory, is overridden by
    ± f δ ⊙ s in an evaluation, which the layer adds to its own product.

    Args:
        sigma, decay: σ and γ.
        stored: whether e is; otherwise it is zero at every :meth:`descend`.
    """

    thin = False
    draws_separately = True

    def __init__(self, name: str, parameter: nn.Parameter, layer: QuantizedLinear, sigma: float, decay: float, stored: bool = True) -> None:
        super().__init__(name, parameter, parameter.shape)
        self.layer, self.sigma, self.decay_rate, self.stored = layer, sigma, decay, stored
        self.residual: Tensor | None = None

    def _uniform(self, key: Key) -> Tensor:
        """Numbers in [0, 1) of a key, float32, of the shape of θ."""
        return uniform_integers(key, slice(0, self.numel), _BITS, self.device).float().mul_(2.0**-_BITS).view(self.shape)

    @tagged("directions")
    def changes(self, directions: Directions, key: Key) -> Tensor:
        """δ of a direction, float32."""
        found = directions.draw(key, self.shape, self.device).mul_(self.sigma)
        found.add_(self._uniform(key._replace(purpose="rounding"))).floor_()
        return found.masked_fill_(self.layer.integers().float().abs_() + found.abs() > self.layer.largest, 0.0)

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset | None) -> Tensor:
        if offset is None:
            return self.parameter.detach()
        change = self.changes(directions, offset.key(self.name)).mul_(offset.scale / self.sigma)
        return self.layer.scaled(change).to(self.parameter.dtype)

    @tagged("directions")
    def weighted(self, directions: Directions, weights: Sequence[float], seed: int, step: int) -> Tensor:
        total = torch.zeros(self.shape, device=self.device)
        for direction, weight in enumerate(weights):
            if weight:
                total.add_(self.changes(directions, Key(seed, step, direction, self.name)).mul_(weight / self.sigma))
        return total

    # -- θ and its update -----------------------------------------------------------------------------------------------------------

    @tagged("update")
    def begin_step(self, seed: int, step: int) -> MomentTransport | None:
        if self.stored and self.residual is None:
            self.residual = self.first_residual(seed).half()
        return None

    @tagged("update")
    def first_residual(self, seed: int) -> Tensor:
        """Uniform in [−½, ½), float32."""
        return self._uniform(Key(seed, 0, 0, self.name, "residual")).sub_(0.5)

    @tagged("update")
    def rounded(self, change: Tensor, integers: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and the new e of x = ``change`` (overwritten) at Q = ``integers``, all float32."""
        whole = change.round()
        whole.masked_fill_((integers + whole).abs_() > self.layer.largest, 0.0)
        return whole, change.sub_(whole).clamp_(-_MOST, _MOST)

    @tagged("update")
    def descend(self, directions: Directions, weights: Sequence[float], keep: float, seed: int, step: int) -> None:
        assert keep == 1.0, "codes do not decay"
        change, integers = self.weighted(directions, weights, seed, step), self.layer.integers().float()
        if self.residual is not None:
            change.add_(self.residual.float().mul_(self.decay_rate))
        whole, rest = self.rounded(change, integers)
        self.layer.write_integers(integers.add_(whole).to(torch.int8))
        if self.residual is not None:
            self.residual.copy_(rest)

    @tagged("update")
    def value(self) -> Tensor:
        return self.layer.integers().float()

    @tagged("update")
    def assign(self, value: Tensor, seed: int, step: int) -> None:
        self.layer.write_integers(value.round().to(torch.int8))

    # -- storage --------------------------------------------------------------------------------------------------------------------

    def written(self) -> list[Tensor]:
        return [self.layer.codes]

    def kept(self) -> list[Tensor]:
        return [] if self.residual is None else [self.residual]

    def reset(self) -> None:
        self.residual = None

    def state(self) -> dict[str, Tensor]:
        return {"codes": self.layer.codes, **({} if self.residual is None else {"residual": self.residual})}

    @tagged("update")
    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        codes, residual = state.get("codes"), state.get("residual")
        if codes is None:
            raise ValueError(f"the saved state of {self.name} has no codes.")
        self.layer.codes.copy_(matching(codes, self.layer.codes, self.name))
        expected = torch.empty(self.shape, dtype=torch.float16, device=self.device)
        self.residual = None if residual is None else expected.copy_(matching(residual, expected, self.name))


@dataclass(frozen=True)
class Codes(Subspace):
    """The integers of quantized Linear layers; nothing else is trained.

    Args:
        sigma: σ, in units of the integers.
        decay: γ in [0, 1], of the residual.
        stored: whether there is one.

    Raises:
        ValueError: one is out of its range.
    """

    sigma: float = 1e-3
    decay: float = 0.9
    stored: bool = True

    full = False
    quantized = True

    def __post_init__(self) -> None:
        if not (isinstance(self.sigma, (int, float)) and math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"eps must be a positive number, in units of the quantized weights' integers, not {self.sigma!r}.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], not {self.decay!r}.")

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        layer = owner_of(parameter)
        assert layer is not None, "the optimizer leaves other parameters out"
        return CodeCoordinate(name, parameter, layer, self.sigma, self.decay, self.stored)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        return 0, -(-math.prod(shape) // 2) if self.stored and len(shape) == 2 else 0  # θ has no floating-point numbers

    def memory(self, update_rule_state: float) -> str:
        return "2 bytes per integer" if self.stored else "past coefficients"
