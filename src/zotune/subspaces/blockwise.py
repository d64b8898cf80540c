"""Block coordinate descent: a block of parameters at a time, or each block by loss differences of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from zotune.subspaces.base import Losses, Subspace
from zotune.subspaces.coordinate import BlockSchedule, Coordinate
from zotune.subspaces.factory import Full
from zotune.weights.structure import repeated_layers

UNITS = ("layer", "linear")
ORDERS = ("gauss-seidel", "jacobi")


@dataclass(frozen=True)
class Blocks(Subspace):
    """Coordinates of another subspace, a block of them at a time.

    Args:
        unit: ``"layer"``: each of a model's repeated layers is a block, everything else another one; ``"linear"``: every module with
            parameters of its own is. A model without repeated layers has blocks of the second kind.
        order: ``"gauss-seidel"``: step t trains block t mod B; ``"jacobi"``: every step trains all blocks, direction k being 0 outside
            block k mod B, so that each block has a loss difference of its own.
        inner: the subspace within a block.

    Raises:
        ValueError: unit or order is unknown.
    """

    unit: str = "layer"
    order: str = "gauss-seidel"
    inner: Subspace = field(default_factory=Full)

    def __post_init__(self) -> None:
        for name, value, known in (("unit", self.unit, UNITS), ("order", self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"unknown {name} of blocks {value!r}; choose one of {', '.join(known)}.")

    @property
    def full(self) -> bool:  # type: ignore[override]
        return self.inner.full

    def coordinate(self, name: str, parameter: nn.Parameter) -> Coordinate:
        return self.inner.coordinate(name, parameter)

    def attach(self, model: nn.Module, coordinates: Sequence[Coordinate]) -> int:
        blocks = blocks_of(model, coordinates, self.unit)
        jacobi = self.order == "jacobi"
        for place, block in enumerate(blocks):
            for coordinate in block:
                coordinate.schedule = BlockSchedule(place, len(blocks), by_direction=jacobi)
                if jacobi:  # turns the mean over the directions of all blocks into that over the block's own
                    coordinate.lr_scale *= len(blocks)
        return len(blocks) if jacobi else 1

    def needs_data(self, step: int) -> bool:
        return self.inner.needs_data(step)

    def sample_size(self, step: int) -> int:
        return self.inner.sample_size(step)

    def observe(self, model: nn.Module, coordinates: Sequence[Coordinate], losses: Losses, seed: int, step: int) -> dict[str, Tensor]:
        return self.inner.observe(model, coordinates, losses, seed, step)

    def elements(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.inner.elements(shape)

    def memory(self, update_rule_state: float) -> str:
        return self.inner.memory(update_rule_state)


def blocks_of(model: nn.Module, coordinates: Sequence[Coordinate], unit: str) -> list[list[Coordinate]]:
    """The coordinates by block, in the model's order; one shared by several blocks (a tied weight) belongs to the first."""
    layers = repeated_layers(model) if unit == "layer" else []
    modules: list[list[nn.Module]] = [list(layer.modules()) for layer in layers]
    inside = {id(module) for layer in modules for module in layer}
    outside = [module for module in model.modules() if id(module) not in inside]
    modules += [outside] if layers else [[module] for module in outside]
    left = {id(c.parameter): c for c in coordinates}
    blocks = []
    for members in modules:
        parameters = [p for module in members for p in module._parameters.values() if p is not None]
        blocks.append([left.pop(id(p)) for p in parameters if id(p) in left])
    return [block for block in blocks if block]
