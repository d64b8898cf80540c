"""Scales of layers, from the share of each layer's direction in the loss difference.

All layers are perturbed together and share one loss difference, so those with the largest derivatives decide the learning rate. For the
layers of a language model the second moment of the directional derivative, n_l = E[(Z_l · ∇_l ℓ)²], spreads over two decades. For a
log-likelihood n_l is also the trace of the layer's Fisher information, and so about that of its Hessian. With directions σ_l Z_l in place
of Z_l, in the perturbation and in the update alike, layer l moves at the rate σ_l² η; zotune takes

    σ_l² ∝ d_l / n_l,      Σ σ_l² n_l = Σ n_l,

d_l elements of layer l: Newton's step with one scalar per layer, from forward passes. Every coordinate then has the same share
in the loss difference, whatever its layer, and all layers together as much as without scales. n_l is measured by perturbing one layer at a
time, at the first step and at some of the redraws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from zotune.io.memory_tags import tagged
from zotune.subspaces import LowRankCoordinate

#: Layers with scales of their own, at most; more repeated blocks share scales, neighbors with neighbors.
LAYERS = 8
#: Coefficients that a layer's n_l is the mean square of, at least.
SAMPLES = 8
#: A layer is never taken to be flatter than this part of the mean, which few samples could not tell.
FLATTEST = 0.03

#: Number of the first step whose directions measurements use, beyond those of any run.
STEP = 1 << 40

#: Coefficients of a step's directions, drawn under the given number, (K,).
Coefficients = Callable[[int], Tensor]


def layers(coordinates: Sequence[LowRankCoordinate]) -> list[list[LowRankCoordinate]]:
    """Coordinates that share a scale: a repeated block's, or several neighboring blocks'; any other matrix (an embedding) is by itself.

    Empty where there are not two of them to compare.
    """
    alone: list[list[LowRankCoordinate]] = []
    blocks: dict[str, list[LowRankCoordinate]] = {}
    for coordinate in coordinates:
        parts = coordinate.name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if number is None:
            alone.append([coordinate])
        else:
            blocks.setdefault(".".join(parts[: number + 1]), []).append(coordinate)
    left = max(1, LAYERS - len(alone))
    size = max(1, math.ceil(len(blocks) / left))
    members = list(blocks.values())
    found = alone + [list(itertools.chain(*members[i : i + size])) for i in range(0, len(members), size)]
    return found if len(found) > 1 else []


def due(step: int, interval: int) -> bool:
    """Whether scales are measured at ``step``: at redraws number 0, 1, 4, 16, ..."""
    redraw, rest = divmod(step, interval)
    return not rest and redraw.bit_count() <= 1 and redraw.bit_length() % 2 == redraw.bit_count()


@tagged("activations")
def measure(layers: Sequence[Sequence[LowRankCoordinate]], coefficients: Coefficients) -> list[float] | None:
    """Scales σ_l of the layers, whatever they are now; None where the losses do not show them.

    Args:
        layers: from :func:`layers`.
        coefficients: evaluates the batch; called with 0, 1, ... for other directions of everything.
    """
    everything = [c for layer in layers for c in layer]
    squares = [0.0] * len(layers)
    samples = 0
    for draw in itertools.count():
        with silenced(everything):
            rest = coefficients(draw).double()  # vectors, which are perturbed in any case
        for index, layer in enumerate(layers):
            with silenced([c for c in everything if not any(c is member for member in layer)]):
                own = coefficients(draw).double() - rest
            squares[index] += float(own.square().sum()) / layer[0].scale ** 2
        samples += len(rest)
        if samples >= SAMPLES:
            break
    moments = [square / samples for square in squares]
    total = sum(moments)
    if not (math.isfinite(total) and total > 0):
        return None
    sizes = [sum(c.parameter.numel() for c in layer) for layer in layers]
    mean = total / sum(sizes)
    weights = [1 / max(moment / size, FLATTEST * mean) for moment, size in zip(moments, sizes, strict=True)]
    total_weight = sum(weight * moment for weight, moment in zip(weights, moments, strict=True)) / total
    return [math.sqrt(weight / total_weight) for weight in weights]


@contextmanager
def silenced(coordinates: Sequence[LowRankCoordinate]) -> Iterator[None]:
    """Within, directions do not perturb these coordinates: their V is 0."""
    kept = [c.v.clone() for c in coordinates]
    for coordinate in coordinates:
        assert not coordinate.pending, f"{coordinate.name} has moved since V was drawn"
        coordinate.v.zero_()  # in place: a captured forward reads it there
    try:
        yield
    finally:
        for coordinate, v in zip(coordinates, kept, strict=True):
            coordinate.v.copy_(v)
