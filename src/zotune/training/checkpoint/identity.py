"""Which weights a checkpoint belongs to: their dtypes, and a digest of those that it does not hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from zotune.weights.digest import frozen_digest


@dataclass
class WeightsIdentity:
    """A model's weights during a run.

    Attributes:
        dtypes: of the parameters, sorted, such as ``["float32"]``.
        frozen: digest of what is not trained (the base of an adapter, the codes of quantized layers); None where all is trained.
    """

    dtypes: list[str]
    frozen: str | None


def dtypes_of(model: nn.Module) -> list[str]:
    """The dtypes of a model's parameters, sorted."""
    return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})


def identity_of(model: nn.Module, trained: Collection[Tensor]) -> WeightsIdentity:
    """The identity of a model whose ``trained`` parameters a run trains."""
    return WeightsIdentity(dtypes_of(model), frozen_digest(model, trained))


def check_dtypes(place: Path, then: list[str], now: list[str]) -> None:
    """ValueError where the weights of the run at ``place`` had other dtypes."""
    if then != now:
        was = " and ".join(then)
        raise ValueError(
            f"{place}: the run's weights are {was}, and those of this model {' and '.join(now)}: load it in {was} (--dtype, in Python "
            "dtype=torch....), or start a new run from the checkpoint's weights."
        )


def check_frozen(place: Path, then: str | None, now: str | None) -> None:
    """ValueError where what the run at ``place`` does not train was another."""
    if then != now:
        raise ValueError(
            f"{place} began from another base model: the weights that it does not train are others (digest {str(now)[:12]}…, the run's "
            f"{str(then)[:12]}…). Give the base model of that run, or start a new run in another output_dir."
        )
