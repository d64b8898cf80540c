"""Merging: base weights and several journals make one model, the average of the trained weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zotune.optim.journal import Journal
from zotune.optim.replay import checked_header, replay
from zotune.weights.computed_linear import ComputedLinear, is_computed
from zotune.weights.quantized_linear import owner_of


@torch.no_grad()
def merge(model: nn.Module, journals: Sequence[str | Path | Journal], weights: Sequence[float] | None = None) -> nn.Module:
    """Set a model to θ = Σ w_i θ_i, the runs' trained weights averaged (1602.05629); the runs began with these weights.

    One run's trained weights, and their weighted sum in float64, are alive beside the model. With one journal this is :func:`replay`.

    Args:
        model: the base model, as it was before every one of the runs; changed in place.
        journals: of the runs; they may be of different methods, seeds and lengths, and train different parameters.
        weights: w_i, numbers of examples for instance; they are divided by their sum. None: all the same.

    Returns:
        ``model``.

    Raises:
        ValueError: no journal, weights that make no sense, or a journal of another base model.

    Example:
        >>> import tempfile, zotune
        >>> paths = [Path(tempfile.mkdtemp()) / f"{seed}.zo" for seed in (0, 1)]
        >>> base = nn.Linear(4, 1)
        >>> for seed, path in enumerate(paths):
        ...     model = copy.deepcopy(base)
        ...     optimizer = zotune.ZerothOrder(model, "mezo", lr=1e-2, seed=seed, journal=path)
        ...     loss = optimizer.step(lambda: model(torch.ones(1, 4)).square().mean())
        >>> merged = merge(base, paths)
    """
    if not journals:
        raise ValueError("there is nothing to merge: give the journals of one run or more.")
    shares = _shares(weights, len(journals))
    opened = [journal if isinstance(journal, Journal) else Journal.open(journal) for journal in journals]
    trained = {name for journal in opened for group in checked_header(journal)["groups"] for name, _, _ in group["parameters"]}
    if is_computed(model):
        return _merge_factors(model, opened, shares)
    if any(name in trained and owner_of(parameter) is not None for name, parameter in model.named_parameters()):
        raise ValueError("what runs add to weights held in few bits stays beside them and is not averaged: merge runs without --quantize.")
    sums: dict[str, Tensor] = {}
    for share, journal in zip(shares, opened, strict=True):
        twin = copy.deepcopy(model)
        try:
            optimizer = replay(twin, journal)
        except ValueError as error:
            raise (error if str(journal.path) in str(error) else ValueError(f"{journal.path}: {error}")) from None
        optimizer.remove_hooks()
        for name, parameter in twin.named_parameters():
            if name in trained:
                part = parameter.detach().double().mul_(share)
                sums[name] = sums[name].add_(part) if name in sums else part
    for name, parameter in model.named_parameters():
        if name in sums:
            parameter.copy_(sums[name])
    return model


def _merge_factors(model: nn.Module, journals: Sequence[Journal], shares: Sequence[float]) -> nn.Module:
    """:func:`merge` of an engine's model: factors of the runs side by side, the left ones times the runs' shares."""
    layers = [module for module in model.modules() if isinstance(module, ComputedLinear)]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    began = [layer.take() for layer in layers]  # the adapter that the runs began with
    for share, journal in zip(shares, journals, strict=True):
        for layer, (left, right) in zip(layers, began, strict=True):
            layer.left, layer.right = left, right
        replay(model, journal).remove_hooks()
        for layer, parts in zip(layers, found, strict=True):
            left, right = layer.take()
            parts.append((left * share, right))
    for layer, parts in zip(layers, found, strict=True):
        for left, right in parts:
            layer.add(left, right, 1.0)
    return model


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"there are {count} journals and {len(weights)} weights: give one for each.")
    total = math.fsum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not total > 0:
        raise ValueError(f"weights must be numbers of at least 0, not all of them 0, got {', '.join(f'{weight:g}' for weight in weights)}.")
    return [weight / total for weight in weights]
