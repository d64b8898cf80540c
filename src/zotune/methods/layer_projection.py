"""The schedule of layer projections (DiZO, 2502.03304); :mod:`zotune.optim.layer_projection` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zotune.io.suggest import did_you_mean_or
from zotune.methods.coefficients import CoefficientTransform
from zotune.subspaces.base import at_least_one, positive

#: Which matrices are projected.
PROJECTED = ("key-value", "matrices")
#: Parts of the names of weights that make keys and values, also those that make queries with them.
KEYS_AND_VALUES = frozenset(
    "k_proj v_proj kv_proj qkv_proj key value k v k_lin v_lin kv qkv c_attn query_key_value Wqkv".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class LayerProjection(CoefficientTransform):
    """Every ``interval`` steps the distance of some layers from the weights that training began with is searched for anew.

    Args:
        interval: κ.
        iterations: of a search, two evaluations each.
        eps: ε of the differences, a length.
        lr: s, the rate of the search.
        clip: τ in [0, 1): a search changes a distance by at most this part of it.
        layers: ``"key-value"``: the matrices that make keys and values, all where there are none; ``"matrices"``: all.

    Raises:
        ValueError: a value is out of range.
    """

    interval: int
    iterations: int
    eps: float
    lr: float
    clip: float
    layers: str

    def __post_init__(self) -> None:
        for label, number in (("interval", self.interval), ("iterations", self.iterations)):
            at_least_one(label, number)
        for label, value in (("projection_eps", self.eps), ("projection_lr", self.lr)):
            positive(label, value)
        if not (isinstance(self.clip, (int, float)) and 0 <= self.clip < 1):
            raise ValueError(f"clip must lie in [0, 1), not {self.clip!r}.")
        if self.layers not in PROJECTED:
            raise ValueError(f"unknown projected {self.layers!r}{did_you_mean_or(self.layers, PROJECTED, 'choose one of')}")

    def due(self, step: int) -> bool:
        """Whether a projection comes before a step."""
        return step > 0 and step % self.interval == 0

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Which of these matrices are projected."""
        found = [name for name in names if KEYS_AND_VALUES & set(name.split("."))]
        return found if found and self.layers == "key-value" else list(names)
