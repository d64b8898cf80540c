"""The return values of loss functions, as one tensor of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.methods.estimators import Estimate, Estimator

LossFunction = Callable[..., Any]


def evaluation(loss_fn: LossFunction, parts: Sequence[Any] | None) -> Callable[[], Tensor]:
    """A function without arguments that returns the losses of all micro-batches, float32 (or float64), (n,)."""
    if parts is None:
        return lambda: as_losses([loss_fn()])
    return lambda: as_losses([loss_fn(part) for part in parts])


def may_fail(loss_fn: LossFunction) -> bool:
    """Whether a loss of NaN is a failed measurement, which counts for nothing (its attribute ``may_fail``)."""
    return bool(getattr(loss_fn, "may_fail", False))


def losses_of(loss_fn: LossFunction, rows: Any) -> Tensor:
    return as_losses([loss_fn(rows)])


@tagged("activations")
def as_losses(parts: list[Any]) -> Tensor:
    """The return values of a loss function, one per micro-batch, as one tensor, (n,): float32, or float64 where one of them is.

    Raises:
        ValueError: one of them is neither a scalar nor one loss per example.
    """
    losses = []
    for part in parts:
        loss = part if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float64)
        if loss.dim() > 1:
            raise ValueError(f"the loss function returned shape {tuple(loss.shape)}; return one loss per example, shape (B,), or a scalar.")
        losses.append(loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(-1))
    return torch.cat(losses)


class Losses(NamedTuple):
    """Losses of a step's examples, points × examples.

    Attributes:
        values: (P, N), by point of the estimator. With directions per example or part: by sign, with a column per (example, direction).
        owners: with directions per example or part, the direction of each column, (N,).
        num_directions: K.
        evaluated: sequences that the model evaluated for them.
    """

    values: Tensor
    owners: Tensor | None
    num_directions: int
    evaluated: int

    def without_failed(self) -> Losses:
        """Without the columns that have a NaN, those of failed rewards; unchanged where nothing is left.

        With shared directions an example counts at all points or at none. With directions per example or part it is a pair of an example
        and one of its directions: the example's other directions, and the direction's other examples, still count.
        """
        kept = ~self.values.isnan().any(dim=0)
        if bool(kept.all()) or not bool(kept.any()):
            return self
        owners = None if self.owners is None else self.owners[kept.to(self.owners.device)]
        return self._replace(values=self.values[:, kept], owners=owners)

    def counted(self, loss_fn: LossFunction) -> Losses:
        """:meth:`without_failed` for a loss function that ``may_fail``, as that of rewards; unchanged for others."""
        return self.without_failed() if may_fail(loss_fn) else self

    def estimate(self, estimator: Estimator, eps: float) -> Estimate:
        values = self.values.cpu()  # the step's one wait for the device
        if self.owners is None:
            return estimator.estimate(list(values), eps, self.num_directions)
        return estimator.estimate_own(values, self.owners, eps, self.num_directions)
