"""Siblings: layers that may get the same input, so that a batched evaluation multiplies it with all their fixed factors at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from zotune.forward.layers import rule_of
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate

#: Projections of one attention or gated layer, and not all layers of a list.
MAX_SIBLINGS = 4


def siblings_of(model: nn.Module, by_parameter: Mapping[int, Coordinate]) -> dict[str, tuple[LowRankCoordinate, ...]]:
    """By name of their weight: layers of one parent with inputs of the same width.

    Args:
        model: any module.
        by_parameter: the coordinates, by id of their parameter.
    """
    found: dict[str, tuple[LowRankCoordinate, ...]] = {}
    for parent in model.modules():
        by_width: dict[int, list[LowRankCoordinate]] = {}
        for child in parent.children():
            rule, coordinate = rule_of(child), by_parameter.get(id(child._parameters.get("weight")))
            if rule is None or not isinstance(coordinate, LowRankCoordinate):
                continue
            width = rule.shared_width(child, coordinate)
            if width is not None and coordinate not in by_width.get(width, ()):
                by_width.setdefault(width, []).append(coordinate)
        for group in by_width.values():
            if 1 < len(group) <= MAX_SIBLINGS:
                found.update({coordinate.name: tuple(group) for coordinate in group})
    return found
