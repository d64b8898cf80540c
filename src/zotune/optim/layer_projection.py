"""Layer projections (DiZO, 2502.03304): how far some layers are from the weights that training began with is searched for by itself.

Layer l is at θ_l = θ⁰_l + γ_l Δ_l / ‖Δ_l‖. A search starts at γ_l = ‖Δ_l‖ and takes some zeroth-order steps in all γ_l at once; what comes
out is a ratio γ_l / ‖Δ_l‖ per layer, an event of the journal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zotune.forward.losses import Losses
from zotune.io.memory_tags import tagged
from zotune.methods.layer_projection import LayerProjection
from zotune.optim.evaluator import Evaluator
from zotune.optim.state import StepContext
from zotune.optim.step_transforms import StepTransform
from zotune.rng.directions import Directions, Key, sum_of_blocks
from zotune.subspaces.coordinate import Coordinate, Offset

#: Numbers, beyond those of any run, of the steps whose keys round projected weights.
ROUNDING = 1 << 41
GAUSSIAN = Directions("gaussian")


class StretchedCoordinate:
    """In place of a coordinate while a distance is tried: its weight is θ⁰ + factor · Δ."""

    def __init__(self, coordinate: Coordinate, start: Tensor, factor: float) -> None:
        self.name, self.coordinate, self.start, self.factor = coordinate.name, coordinate, start, factor

    def is_active(self, step: int, direction: int) -> bool:
        return True

    @tagged("update")
    def at(self, directions: Directions, offset: Offset) -> Tensor:
        return stretched(self.coordinate, self.start, self.factor).to(self.coordinate.parameter.dtype)


@tagged("update")
def stretched(coordinate: Coordinate, start: Tensor, factor: float) -> Tensor:
    """θ⁰ + factor · (θ − θ⁰), in θ's precision."""
    value = coordinate.value()
    return torch.lerp(start.to(value.dtype).view(value.shape), value, factor)


class LayerProjections(StepTransform):
    """The searches of a run, and θ⁰ of the projected layers, in their own precision."""

    name = "projection"

    def __init__(self, schedule: LayerProjection, evaluator: Evaluator) -> None:
        self.schedule, self.evaluator = schedule, evaluator
        matrices = {c.name: c for c in evaluator.forward.coordinates if len(c.shape) > 1}
        self.layers = [matrices[name] for name in schedule.chosen(list(matrices))]
        with torch.no_grad():
            self.starts = {c.name: c.parameter.detach().clone() for c in self.layers}

    @tagged("update")
    def search(self, context: StepContext) -> tuple[list[float], int, int]:
        """(ratio γ_l / ‖Δ_l‖ of every layer, forward passes, sequences evaluated), on the batch of a step.

        A pair of losses that is not finite changes nothing.
        """
        schedule, forward, evaluate = self.schedule, self.evaluator.forward, self.evaluator.function(context)
        lengths = [self._length(coordinate) for coordinate in self.layers]
        ratios, sequences = [1.0] * len(lengths), 0
        for iteration in range(schedule.iterations):
            z = [self._draw(context, iteration, c.name, length) for c, length in zip(self.layers, lengths, strict=True)]
            means = []
            for sign in (1.0, -1.0):
                moves = [sign * schedule.eps * move / length if length else 0.0 for move, length in zip(z, lengths, strict=True)]
                factors = {c.name: (c, ratio + move) for c, ratio, move in zip(self.layers, ratios, moves, strict=True)}
                tried = {name: StretchedCoordinate(c, self.starts[name], factor) for name, (c, factor) in factors.items()}
                with forward.replace_coordinates(tried):
                    losses = forward.evaluate(evaluate, Offset(1.0, context.seed, context.step, iteration), only=tried)
                sequences += losses.numel()
                counted = Losses(losses.unsqueeze(0), None, 1, losses.numel()).counted(context.loss_fn)
                means.append(float(counted.values.double().mean()))
            slope = (means[0] - means[1]) / (2 * schedule.eps)
            if math.isfinite(slope):
                low, high = 1 - schedule.clip, 1 + schedule.clip
                ratios = [min(high, max(low, ratio - schedule.lr * slope * move)) for ratio, move in zip(ratios, z, strict=True)]
        return ratios, 2 * schedule.iterations, sequences

    def _draw(self, context: StepContext, iteration: int, name: str, length: float) -> float:
        """z_l, clipped so that θ_l ± ε z_l stays within the clip of a distance of ``length``."""
        most = self.schedule.clip * length / self.schedule.eps
        z = float(GAUSSIAN.draw(Key(context.seed, context.step, iteration, name, "projection"), (1,)))
        return min(most, max(-most, z))

    def _length(self, coordinate: Coordinate) -> float:
        """‖θ − θ⁰‖."""
        now, start = coordinate.value().reshape(-1), self.starts[coordinate.name].view(-1)
        far = sum_of_blocks(lambda part: (now[part].double() - start[part].double()).square_(), now.numel(), now.device)
        return math.sqrt(far)

    def apply(self, ratios: Sequence[float], seed: int, step: int) -> None:
        """Stretch every layer's distance by its ratio, before a step."""
        for coordinate, ratio in zip(self.layers, ratios, strict=True):
            if ratio != 1.0:
                coordinate.assign(stretched(coordinate, self.starts[coordinate.name], float(ratio)), seed, ROUNDING + step)

    def tensors(self) -> dict[str, Tensor]:
        return self.starts

    def restore(self, state: dict[str, object], tensors: dict[str, Tensor]) -> None:
        for name, start in self.starts.items():
            start.copy_(tensors[name])
