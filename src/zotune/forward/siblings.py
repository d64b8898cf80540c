"""Layers that may be given the same input, so that a batched evaluation multiplies it with all their fixed factors at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from zotune.forward.layers import rule_of
from zotune.subspaces import LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate

#: Projections of one attention or gated layer, and no list of layers that have nothing else in common.
MOST_SIBLINGS = 4


def siblings_of(model: nn.Module, by_parameter: Mapping[int, Coordinate]) -> dict[str, tuple[LowRankCoordinate, ...]]:
    """By name of their weight: layers of one parent with inputs of one width, which may turn out to be the same input.

    Args:
        model: any module.
        by_parameter: the coordinates, by id of their parameter.
    """
    found: dict[str, tuple[LowRankCoordinate, ...]] = {}
    for parent in model.modules():
        alike: dict[int, list[LowRankCoordinate]] = {}
        for child in parent.children():
            rule = rule_of(child)
            coordinate = by_parameter.get(id(child._parameters.get("weight"))) if rule is not None else None
            if rule is None or not isinstance(coordinate, LowRankCoordinate):
                continue
            width = rule.shared_width(child, coordinate)
            if width is not None and coordinate not in alike.get(width, ()):
                alike.setdefault(width, []).append(coordinate)
        for group in alike.values():
            if 1 < len(group) <= MOST_SIBLINGS:
                found.update({coordinate.name: tuple(group) for coordinate in group})
    return found
