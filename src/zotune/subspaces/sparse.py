"""Sparse full space: of every matrix only the elements under a mask are trained, a function of a key or of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.rng.directions import Key, for_blocks, uniform_integers
from zotune.subspaces.base import Subspace, at_least_one, check_density
from zotune.subspaces.coordinate import Coordinate
from zotune.subspaces.full import FullCoordinate
from zotune.subspaces.scaled_directions import Factors, ScaledCoordinate

#: Kinds of masks.
CHOICES = ("uniform", "magnitude", "small")
_BITS = 24
#: Magnitudes are binned by the upper 16 of the 31 bits of a float32's: to within 0.4%.
_SHIFT = 15
_BLOCK = 1 << 22


class MaskedCoordinate(ScaledCoordinate):
    """θ = W with directions m ⊙ Z, m a mask of zeros and ones.

    - a *random* mask keeps every element with probability ``share``, drawn from a key, anew every ``interval`` steps;
    - the mask of *small* weights is |W| ≤ ``threshold``, of the current W.
    """

    def __init__(self, name: str, parameter: nn.Parameter, interval: int, share: float | None) -> None:
        super().__init__(name, parameter)
        self.interval, self.share = interval, share
        self.threshold = 0.0

    def factors(self, seed: int, step: int) -> Factors:
        if self.share is None:
            flat, threshold = self._flat(), self.threshold
            return lambda part: flat[part].abs() <= threshold
        key, below = Key(seed, step // self.interval, 0, self.name, "mask"), round(self.share * (1 << _BITS))
        return lambda part: uniform_integers(key, part, _BITS, self.device) < below

    @tagged("directions")
    def fixed_factors(self, seed: int, step: int) -> Factors:
        factors = self.factors(seed, step)
        if self.share is not None:
            return factors
        mask = torch.empty(self.numel, dtype=torch.bool, device=self.device)
        for_blocks(self.numel, self.device, lambda part: mask[part].copy_(factors(part)))  # type: ignore[arg-type, return-value]
        return lambda part: mask[part]

    @tagged("directions")
    def state(self) -> dict[str, Tensor]:
        value = self.threshold if self.share is None else self.share
        return super().state() | {"mask": torch.tensor(value, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        super().load_state(state, seed, step)
        if self.share is None:
            self.threshold = float(state["mask"])
        else:
            self.share = float(state["mask"])


@dataclass(frozen=True)
class Sparse(Subspace):
    """A fraction of every matrix is trained; vectors (bias, norm) are trained whole.

    Args:
        density: the fraction, in (0, 1].
        choice: ``"uniform"``: random elements, the same fraction of every matrix; ``"magnitude"``: random elements, of a matrix as many
            as it has among the ``density`` largest magnitudes of all matrices; ``"small"``: the smallest magnitudes of each matrix.
        interval: steps between two draws of random masks.

    Raises:
        ValueError: an argument is invalid.
    """

    density: float = 0.8
    choice: str = "uniform"
    interval: int = 100

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.choice not in CHOICES:
            raise ValueError(f"unknown choice of a mask {self.choice!r}; choose one of {', '.join(CHOICES)}.")
        at_least_one("interval", self.interval)

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        if parameter.dim() < 2:
            return FullCoordinate(name, parameter)
        return MaskedCoordinate(name, parameter, self.interval, None if self.choice == "small" else self.density)

    @tagged("directions")
    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        masked = [c for c in coordinates if isinstance(c, MaskedCoordinate)]
        if self.choice == "small":
            for coordinate in masked:
                coordinate.threshold = magnitude(_histogram(coordinate.parameter), self.density)
        elif self.choice == "magnitude" and masked:
            histograms = [_histogram(c.parameter) for c in masked]
            threshold = magnitude(torch.stack(histograms).sum(dim=0), 1 - self.density)
            above = _bin(torch.tensor([threshold])).item() + 1
            for coordinate, histogram in zip(masked, histograms, strict=True):
                coordinate.share = float(histogram[above:].sum()) / coordinate.numel
        return 1


def _bin(values: Tensor) -> Tensor:
    return values.detach().float().abs().view(torch.int32).bitwise_right_shift(_SHIFT).long()


def _histogram(values: Tensor) -> Tensor:
    """Number of elements by magnitude bin, int64 on the CPU."""
    flat = values.detach().reshape(-1)
    parts = [torch.bincount(_bin(flat[at : at + _BLOCK]), minlength=1 << (31 - _SHIFT)).cpu() for at in range(0, len(flat), _BLOCK)]
    return torch.stack(parts).sum(dim=0)


def magnitude(histogram: Tensor, fraction: float) -> float:
    """The quantile ``fraction`` of the magnitudes of a :func:`_histogram`, to within 0.4%; 0 for ``fraction`` 0."""
    if fraction <= 0:
        return 0.0
    reached = histogram.cumsum(0) >= fraction * int(histogram.sum()) - 0.5
    bits = ((int(reached.int().argmax()) + 1) << _SHIFT) - 1
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
