"""Derivatives along the elements of S of every guided layer, from the forward pass that evaluates the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.output_gradients import OutputGradientRecorder
from zotune.subspaces.guided import GuidedCoordinate
from zotune.weights.layouts import is_outputs_first


class LayerSlopes:
    """Vᵀx at the scored positions, for every active layer, recorded while losses are computed."""

    def __init__(self, recorder: OutputGradientRecorder, layers: dict[nn.Module, GuidedCoordinate]) -> None:
        self.recorder, self.layers = recorder, layers
        self.found: dict[str, list[Tensor]] = {}
        self.outputs_first: dict[str, bool] = {c.name: is_outputs_first(layer) for layer, c in layers.items()}

    @tagged("activations")
    def record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        coordinate = self.layers[module]
        rows = self.recorder.scored_rows(args[0]) if args and isinstance(args[0], Tensor) else None
        if rows is not None:
            factor = coordinate.v if self.outputs_first[coordinate.name] else coordinate.p
            self.found.setdefault(coordinate.name, []).append(rows.float() @ factor.to(rows.device))

    @tagged("activations")
    def slopes(self, coordinates: Sequence[GuidedCoordinate], losses: int) -> Tensor:
        """Derivatives of so many losses along every element of S, (C, losses); 0 for a layer that was not recorded."""
        recorder, tables = self.recorder, []
        gradients = torch.cat(recorder.gradients) if recorder.gradients else torch.zeros(0, 1)
        examples = torch.cat(recorder.examples) if recorder.examples else torch.zeros(0, dtype=torch.long)
        owners = examples * losses // max(1, recorder.num_examples)  # one loss of several examples is the mean of theirs
        share = losses / max(1, recorder.num_examples)
        for coordinate in coordinates:
            table = torch.zeros(losses, coordinate.num_guided, device=gradients.device)
            rows = torch.cat(self.found[coordinate.name]) if coordinate.name in self.found else None
            if rows is not None and len(rows) == len(gradients):
                first = self.outputs_first[coordinate.name]
                outputs = gradients @ (coordinate.p if first else coordinate.v).to(gradients.device)
                rows = rows.to(gradients.device)
                left, right = (outputs, rows) if first else (rows, outputs)
                products = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
                table.index_add_(0, owners, products, alpha=share)
            tables.append(table.T)
        return torch.cat(tables)
