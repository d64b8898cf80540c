"""Subspaces: which coordinates θ of a model are trained, and the map from coordinates to weights.

A *subspace* is a small configuration (:class:`Full`, :class:`LowRank`, ...); applied to a model it makes one *coordinate* object for each
trainable parameter. A coordinate gives its weight at θ + offset without writing it, applies updates, and keeps what resuming needs. It
stores θ in float32, or as a half-precision weight that is rounded stochastically or has a residual: no update is lost to rounding.

Adapters (LoRA, prefix, prompt) are :class:`Full` over the parameters that PEFT leaves trainable.
"""

from __future__ import annotations

from zotune.subspaces.activation import Activation, ActivationCoordinate, InitialActivation
from zotune.subspaces.base import Subspace
from zotune.subspaces.blockwise import Blocks
from zotune.subspaces.codes import CodeCoordinate, Codes
from zotune.subspaces.cone import Cone, ConeCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.factory import Full
from zotune.subspaces.full import FullCoordinate
from zotune.subspaces.gradient_span import GradientSpan
from zotune.subspaces.guided import Guided, GuidedCoordinate
from zotune.subspaces.hessian_scaled import HessianScaled, HessianScaledCoordinate
from zotune.subspaces.low_rank import LowRank, LowRankCoordinate
from zotune.subspaces.projected import Left, RankOnes, TwoSided
from zotune.subspaces.rank_one import RankOneCoordinate, RankOneScaled
from zotune.subspaces.sensitive import IndexedCoordinate, Sensitive
from zotune.subspaces.sparse import MaskedCoordinate, Sparse

__all__ = [
    "Activation",
    "ActivationCoordinate",
    "Blocks",
    "CodeCoordinate",
    "Codes",
    "Cone",
    "ConeCoordinate",
    "Coordinate",
    "Full",
    "FullCoordinate",
    "GradientSpan",
    "Guided",
    "GuidedCoordinate",
    "HessianScaled",
    "HessianScaledCoordinate",
    "IndexedCoordinate",
    "InitialActivation",
    "Left",
    "LowRank",
    "LowRankCoordinate",
    "MaskedCoordinate",
    "Offset",
    "RankOneCoordinate",
    "RankOneScaled",
    "RankOnes",
    "Sensitive",
    "Sparse",
    "Subspace",
    "TwoSided",
]
