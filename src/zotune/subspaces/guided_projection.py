"""The projection of a guided layer: a ridge regression of output gradients on the layer's inputs, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.subspaces.activation import positive_peaks

#: Ridge of the regression, in units of the inputs' mean square.
RIDGE = 0.1
#: Singular values below this fraction of the largest are rounding: the gradients of two options are multiples of one vector.
RANK_TOLERANCE = 1e-5


class CompressedRows:
    """Rows (n,) in low precision.

    Args:
        dtype: ``bfloat16``, or ``float8_e4m3fn`` (three bits of mantissa) with a scale for each row: its rounding adds about a thousandth
            to squares, to which the regression adds a tenth.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.largest = torch.finfo(dtype).max if dtype.itemsize == 1 else None
        self.parts: list[tuple[Tensor, Tensor]] = []

    @tagged("host")
    def add(self, rows: Tensor) -> None:
        rows = rows.cpu().float()
        scales = torch.ones(len(rows), 1) if self.largest is None else rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / self.largest
        self.parts.append(((rows / scales).to(self.dtype), scales))

    @tagged("host")
    def all(self) -> Tensor:
        """All rows, (N, n), float32."""
        found = torch.empty(sum(len(rows) for rows, _ in self.parts), self.parts[0][0].shape[1])
        for place, (rows, scales) in zip(found.split([len(rows) for rows, _ in self.parts]), self.parts, strict=True):
            torch.mul(rows.float(), scales, out=place)
        return found


@tagged("host")
def fit_projection(inputs: Tensor, gradients: Tensor, sampled: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """P (d, rank) and V (n, rank), orthonormal, float32, of inputs x (N, n) and gradients δ (N, d) at the scored positions.

    B = Σ δ_i x_iᵀ (S + λ I)⁻¹ with S the mean of x xᵀ over the inputs ``sampled`` (T, n) at all positions rather than the scored ones, so
    that V responds to what predicts δ and to little else. Columns beyond the rank of the fit are 0. None where the inputs predict nothing.
    """
    size = float(torch.linalg.vector_norm(sampled, dtype=torch.float64)) ** 2 / len(sampled)  # E‖o‖²
    ridge = RIDGE * size / sampled.shape[1]
    if not ridge > 0:
        return None
    whitened = _whitened(inputs, sampled, ridge)  # (n, N)
    # The fit's singular vectors are those of the N rows √M δ, M = x (S + λI)⁻¹ xᵀ / N².
    squares, vectors = torch.linalg.eigh((inputs @ whitened).double() / len(inputs) ** 2)
    _, sizes, right = torch.linalg.svd(squares.clamp_min(0).sqrt().unsqueeze(1) * (vectors.T @ gradients.double()), full_matrices=False)
    if not (bool(sizes.isfinite().all()) and float(sizes[0]) > 0):
        return None
    found = min(rank, int((sizes > RANK_TOLERANCE * sizes[0]).sum()))
    p = torch.nn.functional.pad(positive_peaks(right[:found].T), (0, rank - found)).float()
    v = whitened @ (gradients @ p[:, :found]) / len(inputs)  # Bᵀ = (S + λI)⁻¹ xᵀ δ / N
    basis = torch.linalg.qr(v.double()).Q.float()
    return p, torch.nn.functional.pad(positive_peaks(basis), (0, rank - found))


@tagged("directions")
def compress(sides: Sequence[Tensor]) -> Tensor:
    """Matrices (n_i, q) as int8, (len(sides) + Σ n_i, q): rows of exponents e, one for each matrix, then codes c, its elements c · 2^e.

    e is the least with |c| ≤ 127 in its column, so that compressing what was decompressed changes nothing. The rounding is at most 1/127 of
    the largest element of a column.
    """
    exponents = [(side.abs().amax(dim=0) / 127).clamp_min(2.0**-120).log2().ceil() for side in sides]
    codes = [(side * torch.exp2(-exponent)).round() for side, exponent in zip(sides, exponents, strict=True)]
    return torch.cat([torch.stack(exponents), *codes]).to(torch.int8)


@tagged("directions")
def decompress(packed: Tensor, heights: Sequence[int]) -> list[Tensor]:
    """The matrices of :func:`compress`, float32, of so many rows each."""
    exponents, *codes = packed.float().split([len(heights), *heights])
    return [side * torch.exp2(exponent) for side, exponent in zip(codes, exponents, strict=True)]


@tagged("directions")
def polar(matrix: Tensor) -> Tensor:
    """U Wᵀ of M = U Σ Wᵀ (q, q), without the singular vectors whose singular values are rounding; 0 of 0."""
    left, sizes, right = torch.linalg.svd(matrix.double())
    kept = sizes > RANK_TOLERANCE * sizes[0]
    return (left[:, kept] @ right[kept]).to(matrix)


def _whitened(inputs: Tensor, sampled: Tensor, ridge: float) -> Tensor:
    """(S + λI)⁻¹ xᵀ (n, N), S = oᵀo / T, of inputs x (N, n) and sampled inputs o (T, n), by the smaller of two systems.

    (S + λI)⁻¹ xᵀ = (xᵀ − oᵀ (λT I + o oᵀ)⁻¹ o xᵀ) / λ. The solve is in double precision.
    """
    few = len(sampled) <= sampled.shape[1]
    inner = (sampled @ sampled.T if few else sampled.T @ sampled / len(sampled)).double()
    inner.diagonal().add_(ridge * len(sampled) if few else ridge)
    if not few:
        return torch.linalg.solve(inner, inputs.T.double()).float()
    solved = torch.linalg.solve(inner, (sampled @ inputs.T).double()).float()
    return torch.addmm(inputs.T, sampled.T, solved, alpha=-1).div_(ridge)
