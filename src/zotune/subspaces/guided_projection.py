"""The guide of a layer: where a regression of errors on its inputs leads. On the host, from rows that are kept there."""

from __future__ import annotations

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.subspaces.activation import positive_peaks

#: Ridge of the regression, in units of the inputs' mean square.
RIDGE = 0.1
#: Singular values below this part of the largest are the errors' rounding: those of two options are multiples of one vector.
NOTHING = 1e-5


class Rows:
    """Rows (n,), kept in few bits.

    Args:
        dtype: ``float8_e4m3fn``, three binary digits, with a scale for each row: rounding adds about a thousandth to squares, to which the
            regression adds a tenth; or ``bfloat16``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.most = torch.finfo(dtype).max if dtype.itemsize == 1 else None
        self.parts: list[tuple[Tensor, Tensor]] = []

    @tagged("host")
    def add(self, rows: Tensor) -> None:
        rows = rows.cpu().float()
        scales = torch.ones(len(rows), 1) if self.most is None else rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / self.most
        self.parts.append(((rows / scales).to(self.dtype), scales))

    @tagged("host")
    def all(self) -> Tensor:
        """All rows, (N, n), float32."""
        found = torch.empty(sum(len(rows) for rows, _ in self.parts), self.parts[0][0].shape[1])
        for place, (rows, scales) in zip(found.split([len(rows) for rows, _ in self.parts]), self.parts, strict=True):
            torch.mul(rows.float(), scales, out=place)
        return found


@tagged("host")
def guide(inputs: Tensor, errors: Tensor, others: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """P (d, rank) and V (n, rank) in bfloat16, of inputs x (N, n) and errors δ (N, d) at the scored positions and inputs (T, n) anywhere.

    B = Σ δ_i x_iᵀ (S + λ I)⁻¹ with S the mean of x xᵀ over all positions rather than the scored ones, so that V answers to what tells the
    errors and to little else. Columns beyond the rank of the fit are 0. None where the inputs tell nothing.
    """
    size = float(torch.linalg.vector_norm(others, dtype=torch.float64)) ** 2 / len(others)  # E‖o‖²
    ridge = RIDGE * size / others.shape[1]
    if not ridge > 0:
        return None
    whitened = _whitened(inputs, others, ridge)  # (n, N)
    # The fit's singular vectors are those of the N rows √M δ, M = x (S + λI)⁻¹ xᵀ / N².
    squares, vectors = torch.linalg.eigh((inputs @ whitened).double() / len(inputs) ** 2)
    _, sizes, right = torch.linalg.svd(squares.clamp_min(0).sqrt().unsqueeze(1) * (vectors.T @ errors.double()), full_matrices=False)
    if not (bool(sizes.isfinite().all()) and float(sizes[0]) > 0):
        return None
    found = min(rank, int((sizes > NOTHING * sizes[0]).sum()))
    p = torch.nn.functional.pad(positive_peaks(right[:found].T), (0, rank - found)).float()
    v = whitened @ (errors @ p) / len(inputs)  # Bᵀ = (S + λI)⁻¹ xᵀ δ / N
    answer = (others @ v).square().mean(dim=0).clamp_min(1e-30)
    v = v * (size / answer).sqrt()
    return p.bfloat16().contiguous(), v.bfloat16().contiguous()


def _whitened(inputs: Tensor, others: Tensor, ridge: float) -> Tensor:
    """(S + λI)⁻¹ xᵀ (n, N), S = oᵀo / T, of inputs x (N, n) and others o (T, n), by the smaller of two systems.

    (S + λI)⁻¹ xᵀ = (xᵀ − oᵀ (λT I + o oᵀ)⁻¹ o xᵀ) / λ. What is solved is in double precision, what is multiplied by it is not.
    """
    few = len(others) <= others.shape[1]
    inner = (others @ others.T if few else others.T @ others / len(others)).double()
    inner.diagonal().add_(ridge * len(others) if few else ridge)
    if not few:
        return torch.linalg.solve(inner, inputs.T.double()).float()
    solved = torch.linalg.solve(inner, (others @ inputs.T).double()).float()
    return torch.addmm(inputs.T, others.T, solved, alpha=-1).div_(ridge)
