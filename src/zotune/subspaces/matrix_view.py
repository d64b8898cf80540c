"""Tensors of any shape as matrices, which low-rank factors are defined on, and products of the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zotune.io.execution import walked

#: Trailing dimensions of at most this many are those of a convolution's kernel.
KERNEL = 16


class MatrixView(NamedTuple):
    """A tensor as ``number`` matrices (rows, columns), in the order of its elements."""

    number: int
    rows: int
    columns: int

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading dimension of factors: (number,), or () of a single matrix."""
        return (self.number,) if self.number > 1 else ()


def matrix_view(shape: Sequence[int]) -> MatrixView | None:
    """The matrices of a tensor of this shape; None of a vector. Dimensions of size 1 do not count.

    - (m, n): one matrix.
    - (..., m, n) with m and n above :data:`KERNEL`, weights of experts: a matrix for each of the leading indices.
    - (m, ...) otherwise, a convolution's kernel (outputs, inputs, width, ...): one matrix (m, all others).

    Example:
        >>> matrix_view((8, 96, 32)), matrix_view((64, 1, 4))
        (MatrixView(number=8, rows=96, columns=32), MatrixView(number=1, rows=64, columns=4))
    """
    sizes = [size for size in shape if size != 1]
    if len(sizes) < 2:
        return None
    if len(sizes) > 2 and min(sizes[-2:]) > KERNEL:
        return MatrixView(math.prod(sizes[:-2]), sizes[-2], sizes[-1])
    return MatrixView(1, sizes[0], math.prod(sizes[1:]))


def factor_strips(
    left: Tensor, right: Tensor, height: int, strips: Callable[[int], Iterable[tuple[slice, slice]]]
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, their elements, their factors) for strips of ``height`` rows; of a stack, for whole matrices or strips of one.

    Args:
        left, right: factors (m, r) and (n, r), or of a stack (E, m, r) and (E, n, r).
        height: rows at a time.
        strips: (rows, their elements) of strips of such a height of a matrix.
    """
    if left.dim() == 2:
        for rows, part in strips(height):
            yield rows, part, left[rows], right
        return
    m, columns = left.shape[1], right.shape[1]
    together = max(1, height // m)
    for first in walked(range(0, len(left), together)):
        for top in range(0, m, min(m, height)):
            some = left[first : first + together, top : top + height]
            rows = slice(first * m + top, first * m + top + some.shape[0] * some.shape[1])
            yield rows, slice(rows.start * columns, rows.stop * columns), some, right[first : first + together]


def plus_product(block: Tensor, left: Tensor, right: Tensor, keep: float = 1.0, out: Tensor | None = None) -> Tensor:
    """keep · W + left · rightᵀ, of rows of one matrix or of whole matrices (c, m, n), in ``out`` or in place.

    Args:
        block: elements of W, flat.
        left, right: their factors, (rows, r) and (n, r), or (c, m, r) and (c, n, r).
    """
    out, right = block if out is None else out, right.mT.to(block.dtype)
    shape = *left.shape[:-1], right.shape[-1]
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(block.view(shape), left.to(block.dtype), right, beta=keep, out=out.view(shape))
