"""The anchor: the weights θ₀ that training began with, toward which ``anchor_decay`` shrinks, and the distance from them.

    θ ← θ − η (ĝ + λ (θ − θ₀))

Evolution strategies move many weights that their task does not need, and what was learned before is lost in that drift; decay toward θ₀
instead of 0 takes it back where no reward holds against it (2605.30148).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, matching
from zotune.weights import placement, quantized_linear
from zotune.weights.computed_linear import ComputedLinear
from zotune.weights.digest import digest_of

#: Saved states hold an anchor of at most this part of the model's parameters: an adapter's, which may have begun at random.
SAVED = 0.1
#: Elements whose distance is summed at a time.
BLOCK = 1 << 22


class Stored(Protocol):
    """The tensors in the files that a model was loaded from."""

    def __call__(self, name: str) -> Tensor | None:
        """The contiguous tensor of a parameter, not to be written to; None where there is none."""
        ...

    def check(self) -> None:
        """ValueError where a file has been changed since."""
        ...


@dataclass(frozen=True)
class Drift:
    """How far training has gone from θ₀.

    Attributes:
        distance: ‖θ − θ₀‖ over all trained weights.
        relative: the same over ‖θ₀‖; None where an engine keeps θ₀ in its file, or it is 0.
    """

    distance: float
    relative: float | None


class Anchor:
    """θ₀ of the trained parameters of a model, as they are when it is constructed.

    Memory: a copy of these parameters in their dtype, on the host, or none where ``stored`` has the same numbers in files. Those that are
    trained in full space have theirs beside the weight once an optimizer is constructed, since every step reads it; of those with low-rank
    factors the host's copy is read at a redraw only. Weights held in few bits, or by an engine, need none: what training adds to them is
    stored apart, and θ₀ is all the rest.

    Args:
        model: what will be trained.
        parameters: which of its parameters; None: those with ``requires_grad``.
        stored: where the model was loaded from.

    Raises:
        ValueError: a parameter is offloaded or sharded, or an engine's model begins with an adapter.
    """

    @tagged("host")
    def __init__(self, model: nn.Module, parameters: Iterable[Tensor] | None = None, stored: Stored | None = None) -> None:
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        trained: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad if chosen is None else id(parameter) in chosen:
                layer = quantized_linear.owner_of(parameter)
                _check(name, parameter, layer)
                if layer is None:
                    trained[name] = parameter.detach()
        self.is_small = sum(map(Tensor.numel, trained.values())) <= SAVED * sum(map(Tensor.numel, model.parameters()))
        self.stored = None if self.is_small else stored
        self.mapped: set[str] = set()
        self.weights = {name: self._kept(name, weight) for name, weight in trained.items()}

    def _kept(self, name: str, weight: Tensor) -> Tensor:
        """The weight's numbers, flat: in a file that has the same ones, or a copy."""
        found = None if self.stored is None else self.stored(name)
        if found is not None and found.dtype == weight.dtype and torch.equal(found, weight.cpu()):
            self.mapped.add(name)
            return found.view(-1)
        return weight.reshape(-1).to("cpu", copy=True)

    def check_stored(self) -> None:
        """ValueError where files that it is read from have been changed."""
        if self.stored is not None and self.mapped:
            self.stored.check()

    def tensors(self) -> dict[str, Tensor]:
        """What a saved state holds of it: everything, where it is small."""
        return self.weights if self.is_small else {}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take the anchor of a saved state.

        Raises:
            ValueError: it is another model's.
        """
        for name, saved in weights.items():
            if name not in self.weights:
                raise ValueError(f"the saved run trains {name!r}, which this one does not; construct the optimizer as it was then.")
            self.weights[name].copy_(matching(saved, self.weights[name], name))
        self.__dict__.pop("digest", None)

    @functools.cached_property
    def digest(self) -> str:
        """Names this θ₀ in saved states."""
        return digest_of(self.weights)

    def check(self, coordinates: Iterable[Coordinate]) -> None:
        """ValueError where it is another model's."""
        for name, parameter in ((c.name, c.parameter) for c in coordinates):
            known = self.weights.get(name)
            if quantized_linear.owner_of(parameter) is None and (known is None or known.numel() != parameter.numel()):
                raise ValueError(f"the anchor is not of this model: it has no {name} of {parameter.numel()} elements.")

    @tagged("update")
    def attach(self, coordinates: Iterable[Coordinate]) -> None:
        """Have the decay of coordinates shrink toward this anchor."""
        for coordinate in coordinates:
            name = coordinate.name
            if quantized_linear.owner_of(coordinate.parameter) is not None:
                coordinate.set_anchor(None)
                continue
            if not isinstance(coordinate, LowRankCoordinate):
                self.weights[name] = self.weights[name].to(coordinate.device, copy=name not in self.mapped)
            coordinate.set_anchor(self.weights[name])

    def drift(self, coordinates: Iterable[Coordinate]) -> Drift:
        """The distance of coordinates' weights from this anchor, pending updates included."""
        far, size, known = 0.0, 0.0, True
        for coordinate in coordinates:
            layer = quantized_linear.owner_of(coordinate.parameter)
            if layer is not None:
                assert isinstance(coordinate, LowRankCoordinate)
                far += _added(layer, coordinate)
                known = known and not isinstance(layer, ComputedLinear)
                size += 0.0 if not known else float(layer.with_factors(layer.left[:, :0], layer.right[:, :0]).double().square().sum())
                continue
            now = coordinate.merged() if isinstance(coordinate, LowRankCoordinate) else coordinate.parameter.detach()
            began = self.weights[coordinate.name]
            flat = now.reshape(-1)
            for start in range(0, len(flat), BLOCK):
                here = began[start : start + BLOCK].to(flat.device).double()
                size += float(here.square().sum())
                far += float((flat[start : start + BLOCK].double() - here).square().sum())
        return Drift(math.sqrt(far), math.sqrt(far / size) if known and size > 0 else None)


def drift(anchor: Anchor | None, coordinates: Sequence[Coordinate]) -> Drift | None:
    """How far training has gone; None where neither an anchor is kept nor all that training adds is stored apart."""
    if any(coordinate.written() for coordinate in coordinates):  # no anchor has them
        return None
    if anchor is None:
        apart = all(quantized_linear.owner_of(coordinate.parameter) is not None for coordinate in coordinates)
        anchor = Anchor(nn.Module()) if apart else None
    return None if anchor is None else anchor.drift(coordinates)


def _check(name: str, parameter: Tensor, layer: quantized_linear.QuantizedLinear | None) -> None:
    if placement.offload_handle(parameter) is not None:
        raise ValueError(f"{name} is offloaded, and an anchor is a copy of it in memory: train an adapter (PEFT), or set anchor_decay=0.")
    if placement.is_sharded(parameter):
        raise ValueError(f"{name} is sharded, which anchor_decay does not support: train an adapter (PEFT), or set anchor_decay=0.")
    if layer is not None and layer.left.shape[1]:
        raise ValueError(
            f"{name} begins with low-rank factors of an earlier run, which anchor_decay cannot tell from those of this one: merge them "
            "into the weights first, or set anchor_decay=0."
        )


@torch.no_grad()
def _added(layer: quantized_linear.QuantizedLinear, coordinate: LowRankCoordinate) -> float:
    """‖L Rᵀ‖² of what training has added to a layer, pending factors included, as tr (LᵀL)(RᵀR)."""
    left, right = layer.left.double() * coordinate.keep, layer.right.double()
    more = coordinate.pending_factors()
    if more[0] is not None and more[1] is not None:
        left, right = torch.cat([left, more[0].double()], dim=1), torch.cat([right, more[1].double()], dim=1)
    return max(0.0, float(((left.T @ left) * (right.T @ right)).sum()))
