"""Coefficients of sequential and batched evaluation side by side."""

from __future__ import annotations

import warnings

import torch

from zotune import ZerothOrder, methods


def coefficients(build, loss_of, batches, method: methods.Method, forward_batching: str, steps: int = 2) -> torch.Tensor:
    model = build()
    optimizer = ZerothOrder(model, method, lr=1e-3, forward_batching=forward_batching)
    found = []
    for _ in range(steps):
        optimizer.step(loss_of(model), batches)
        found.append(optimizer.last_report.coefficients)
    assert optimizer.evaluator.batched is (forward_batching == "batched")
    return torch.cat(found)


def agree(build, loss_of, batches, method: methods.Method, tolerance: float = 1e-4) -> bool:
    """Coefficients of both probes; ``tolerance`` relative to the largest (ε = 1e-2: rounding of the loss over 2ε)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (coefficients(build, loss_of, batches, method, forward_batching) for forward_batching in ("sequential", "batched"))
    return float((one - other).abs().max()) <= tolerance * max(1.0, float(one.abs().max()))
