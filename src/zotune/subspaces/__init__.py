"""Subspaces: which coordinates θ of a model move, and the map from coordinates to weights.

A *subspace* is a small configuration (:class:`Full`, :class:`LowRank`, ...); applied to a model it gives one *coordinate* object for each
trainable parameter. A coordinate knows how to hand out its weight at θ + offset without writing it, how to take an update, and what
must be kept to resume. Everything it keeps is float32 (or float32 split over a half-precision weight and a residual): no update is lost
to rounding.

Adapters (LoRA, prefix, prompt) need no class of their own: they are :class:`Full` over whatever parameters PEFT leaves trainable.
"""

from __future__ import annotations

from zotune.subspaces.activation import Activation, ActivationCoordinate
from zotune.subspaces.base import Subspace
from zotune.subspaces.blockwise import Blocks
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.factory import Full
from zotune.subspaces.full import FullCoordinate
from zotune.subspaces.guided import Guided, GuidedCoordinate
from zotune.subspaces.hessian_scaled import HessianScaled, HessianScaledCoordinate
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate
from zotune.subspaces.projected import Left, RankOnes, TwoSided
from zotune.subspaces.sensitive import IndexedCoordinate, Sensitive
from zotune.subspaces.sparse import MaskedCoordinate, Sparse

__all__ = [
    "Activation",
    "ActivationCoordinate",
    "Blocks",
    "Coordinate",
    "Full",
    "FullCoordinate",
    "Guided",
    "GuidedCoordinate",
    "HessianScaled",
    "HessianScaledCoordinate",
    "IndexedCoordinate",
    "Left",
    "LowRank",
    "LowRankCoordinate",
    "MaskedCoordinate",
    "Offset",
    "RankOnes",
    "Sensitive",
    "Sparse",
    "Subspace",
    "TwoSided",
]
