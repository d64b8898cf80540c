"""Low rank on both sides, in the leading singular subspace of a gradient estimated along a few directions (P-GAP)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.execution import walked
from zotune.io.memory_tags import tagged
from zotune.rng.counter import stream
from zotune.rng.directions import Directions, Key, for_blocks
from zotune.subspaces.base import Losses, at_least_one, not_negative
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.low_rank import LowRankCoordinate
from zotune.subspaces.projected import TwoSided, TwoSidedCoordinate, orthonormal
from zotune.weights import quantized_linear

#: ε of the probes.
EPS = 1e-3
#: Iterations of the power iteration, and its oversampling: vectors beyond the rank.
ITERATIONS, OVERSAMPLING = 3, 16
#: Elements of a matrix that are multiplied at a time, in float64.
STRIP = 1 << 20

GAUSSIAN = Directions("gaussian")


class GradientSpanCoordinate(TwoSidedCoordinate):
    """θ = S (r, r) of W + σ P S Qᵀ, P and Q the leading singular vectors of G = Σ_j c_j Z_j from probes along Z_j, σ = √(mn) / r.

    With E = PᵀGQ / ‖PᵀGQ‖ a direction is Z = Z₀ − (⟨E, Z₀⟩ − ξ √δ) E, Z₀ drawn and ξ = ±1, so that ⟨E, Z⟩ = ξ √δ. Without probes P and Q
    are random and Z = Z₀.

    Attributes:
        axis: E; 0 without probes.
        probed: c, (h,), that P and Q are made of.
    """

    draws_separately = True

    def __init__(self, name: str, parameter: nn.Parameter, subspace: GradientSpan) -> None:
        super().__init__(name, parameter, subspace.rank, subspace.interval)
        self.subspace = subspace
        self.axis = torch.zeros(self.shape, device=parameter.device)
        self.probed: Tensor | None = None

    @tagged("directions")
    def draw(self, directions: Directions, seed: int, step: int, first: int, count: int, alone: bool = False) -> Tensor:
        z = super().draw(directions, seed, step, first, count, alone)
        signs = [1.0 if stream(Key(seed, step, first + k, self.name, "sign")) >> 63 else -1.0 for k in range(count)]
        target = math.sqrt(self.subspace.delta_of(step)) * torch.tensor(signs, device=z.device).view(count, *[1] * (z.dim() - 1))
        return z - ((z * self.axis).sum(dim=(-2, -1), keepdim=True) - target) * self.axis

    def bases(self, seed: int, redraw: int) -> tuple[Tensor, Tensor]:
        self.probed, self.observed = self.observed, None
        self.axis = torch.zeros_like(self.axis)
        if self.probed is None:
            return super().bases(seed, redraw)
        start = self._gaussian(seed, redraw, "subspace", (*self.matrices.stack, self.matrices.columns, self._width))
        p, sizes, q = leading(self.estimate(seed, redraw, self.probed), self.rank, start)
        self.axis = torch.diag_embed(sizes / sizes.norm(dim=-1, keepdim=True))
        return p, q

    @property
    def _width(self) -> int:
        return min(self.rank + OVERSAMPLING, self.matrices.rows, self.matrices.columns)

    @tagged("directions")
    def estimate(self, seed: int, redraw: int, coefficients: Tensor) -> Tensor:
        """Σ_j c_j Z_j along the probes of a redraw, float32, (..., m, n)."""
        total = torch.zeros(self.parameter.numel(), device=self.device)

        def add(part: slice) -> None:
            for probe, c in enumerate(coefficients):
                total[part] += GAUSSIAN.block(Key(seed, redraw, probe, self.name, "probe"), part, self.device).mul_(c)

        for_blocks(total.numel(), self.device, add)
        return total.view(*self.matrices.stack, self.matrices.rows, self.matrices.columns)

    def kept(self) -> list[Tensor]:
        return [*super().kept(), self.axis]

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self.probed is None else {"probed": self.probed})

    def load_state(self, state: dict[str, Tensor], seed: int, step: int) -> None:
        self.observed = state.get("probed")
        super().load_state(state, seed, step)


class _Probe:
    """In place of a coordinate while a probe is evaluated: its weight as it is, plus scale · Z_j of all its elements."""

    def __init__(self, coordinate: GradientSpanCoordinate) -> None:
        self.name, self.coordinate = coordinate.name, coordinate

    def is_active(self, step: int, direction: int) -> bool:
        return True

    @tagged("directions")
    def at(self, directions: Directions, offset: Offset) -> Tensor:
        weight = self.coordinate.at(directions, None)
        flat, key = weight.reshape(-1), Key(offset.seed, offset.step, offset.direction, self.name, "probe")
        out = torch.empty_like(flat)

        def add(part: slice) -> None:
            out[part] = flat[part] + GAUSSIAN.block(key, part, flat.device, offset.scale)

        for_blocks(len(flat), flat.device, add)
        return out.view(weight.shape)


@dataclass(frozen=True)
class GradientSpan(TwoSided):
    """``TwoSided`` with P and Q from the gradient as ``probes`` central differences along Gaussian directions show it, at every redraw.

    Args:
        rank: r, columns of P and Q.
        interval: steps between two redraws.
        probes: h, differences of a redraw, of all matrices together.
        delta: δ, the square of a direction's part along the estimated gradient.
        delta_steps: steps in which δ falls to 0, linearly; 0: δ stays.

    Raises:
        ValueError: an argument is out of its range.
    """

    rank: int = 128
    interval: int = 100
    probes: int = 10
    delta: float = 2.0
    delta_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("probes", self.probes)
        not_negative("delta", self.delta)
        if not (isinstance(self.delta_steps, int) and self.delta_steps >= 0):
            raise ValueError(f"delta_steps must be a whole number of at least 0, not {self.delta_steps!r}.")

    def delta_of(self, step: int) -> float:
        """δ of a step."""
        return self.delta * max(0.0, 1 - step / self.delta_steps) if self.delta_steps else self.delta

    def factored(self, name: str, parameter: nn.Parameter) -> LowRankCoordinate:
        if quantized_linear.owner_of(parameter) is not None:
            raise ValueError(
                f"{name} is quantized, and probes perturb whole weights: use a method that does not (lozo, subzero), or train an "
                "adapter (PEFT)."
            )
        return GradientSpanCoordinate(name, parameter, self)

    def factored_elements(self, rows: int, columns: int) -> tuple[int, int]:
        return self.rank**2, self.rank * (rows + columns + 2 * self.rank)

    def memory(self, update_rule_state: float) -> str:
        return super().memory(update_rule_state).replace("n + r", "n + 2r")

    def needs_data(self, step: int) -> bool:
        return step % self.interval == 0

    @tagged("directions")
    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        """c_j of every probe, (h,), the same under the name of each matrix; probes that are not finite have 0, or all 1 where all have."""
        probed = {c.name: _Probe(c) for c in coordinates if isinstance(c, GradientSpanCoordinate)}
        if not probed:
            return {}
        c = torch.stack([_slope(losses, probed, seed, step // self.interval, probe) for probe in range(self.probes)])
        c = torch.where(c.isfinite(), c, 0.0)
        c = torch.where(c.any(), c, 1.0)
        return {name: c.clone() for name in probed}


def _slope(losses: Losses, probed: Mapping[str, _Probe], seed: int, redraw: int, probe: int) -> Tensor:
    """(L(θ + εZ) − L(θ − εZ)) / 2ε along a probe, float32, on the CPU."""
    high, low = (
        torch.cat([found.detach().reshape(-1).double().cpu() for found in losses(Offset(sign * EPS, seed, redraw, probe), probed)]).mean()
        for sign in (+1, -1)
    )
    return ((high - low) / (2 * EPS)).float()


@tagged("directions")
def leading(matrix: Tensor, rank: int, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P (..., m, r), σ (..., r), Q (..., n, r)) of the leading singular vectors, float32, the largest element of each of P's positive.

    By power iteration from ``start`` (..., n, w) in float64, so that rounding to float32 hides the order of sums; exact for w = min(m, n).
    """
    q = orthonormal(start)
    for _ in range(ITERATIONS):
        p = orthonormal(_times(matrix, q))
        q = orthonormal(_transposed_times(matrix, p))
    core = (p.mT.double() @ _times(matrix, q)).cpu()
    left, sizes, right = torch.linalg.svd(core)
    device = matrix.device
    p, q = p.double() @ left[..., :rank].to(device), q.double() @ right.mT[..., :rank].to(device)
    peak = p.gather(-2, p.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return (p * sign).float(), sizes[..., :rank].float().to(device), (q * sign).float()


def _strips(matrix: Tensor) -> list[slice]:
    rows, columns = matrix.shape[-2:]
    height = max(1, STRIP // (columns * math.prod(matrix.shape[:-2])))
    return [slice(top, min(rows, top + height)) for top in range(0, rows, height)]


def _times(matrix: Tensor, q: Tensor) -> Tensor:
    """matrix · q, float64."""
    out = torch.empty(*matrix.shape[:-1], q.shape[-1], dtype=torch.float64, device=matrix.device)
    for rows in walked(_strips(matrix)):
        out[..., rows, :] = matrix[..., rows, :].double() @ q.double()
    return out


def _transposed_times(matrix: Tensor, p: Tensor) -> Tensor:
    """matrixᵀ · p, float64."""
    out = torch.zeros(*matrix.shape[:-2], matrix.shape[-1], p.shape[-1], dtype=torch.float64, device=matrix.device)
    for rows in walked(_strips(matrix)):
        out += matrix[..., rows, :].mT.double() @ p[..., rows, :].double()
    return out
