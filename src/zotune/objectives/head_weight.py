"""The weight of a language model's head, as output gradients need it: rows of it, and products with it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class HeadWeight(Protocol):
    """W (vocabulary, d).

    Attributes:
        shape: (vocabulary, d).
    """

    shape: tuple[int, int]

    def rows(self, ids: Tensor) -> Tensor:
        """W[ids], (..., d) in float32."""
        ...

    def product(self, weights: Tensor) -> Tensor:
        """weights (N, vocabulary) · W, (N, d) in float32."""
        ...


class _Matrix:
    """The weight of an ordinary layer."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight.detach(), (weight.shape[0], weight.shape[1])

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()

    def product(self, weights: Tensor) -> Tensor:
        return (weights.to(self.weight.dtype) @ self.weight).float()


def head_weight(head: nn.Module | None) -> HeadWeight | None:
    """The weight of a head; None where it has none of two dimensions. A head of an engine (``engines``) gives rows and products itself."""
    if hasattr(head, "rows") and hasattr(head, "product"):
        return head  # type: ignore[return-value]
    weight = getattr(head, "weight", None)
    return _Matrix(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None
