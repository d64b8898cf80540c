"""Which base model an adapter was trained on: a digest of its weights, kept beside the adapter (`zotune_base.json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zotune.io.typed import read_fields
from zotune.training.adapters import base_name
from zotune.training.checkpoint import storage
from zotune.training.checkpoint.identity import dtypes_of
from zotune.weights.digest import digest_of_parameters
from zotune.weights.quantized_linear import is_quantized

FILE = "zotune_base.json"


@dataclass
class BaseIdentity:
    """A base model, as it was loaded.

    Attributes:
        dtypes: of its parameters, sorted.
        digest: of its parameters, before they were quantized.
        without: names of parameters that the digest leaves out: those that the adapter replaces or that no file holds.
    """

    dtypes: list[str]
    digest: str
    without: list[str]


def identity_of_base(model: nn.Module, without: Collection[str] = ()) -> BaseIdentity:
    """The identity of a base model that is not quantized yet."""
    left_out = set(without)
    items = [(name, parameter) for name, parameter in model.named_parameters() if name not in left_out]
    return BaseIdentity(dtypes_of(model), digest_of_parameters(model, items), sorted(left_out))


def identity_below(model: Any) -> BaseIdentity | None:
    """The identity of the base of a PEFT model; None where its weights are quantized, and so are not those of its files."""
    if is_quantized(model):
        return None
    base = model.get_base_model()
    frozen = [(base_name(name), parameter) for name, parameter in base.named_parameters() if not parameter.requires_grad]
    replaced = [base_name(name) for name, _ in base.named_parameters() if ".original_module." in name]
    items = [(name, parameter) for name, parameter in frozen if name not in set(replaced)]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for _, parameter in items})
    return BaseIdentity(dtypes, digest_of_parameters(base, items), sorted(set(replaced)))


def save(folder: Path, base: BaseIdentity) -> None:
    """Writes the identity beside an adapter."""
    storage.save_json(folder / FILE, {"format": storage.FORMAT, **dataclasses.asdict(base)})


def saved(folder: Path) -> BaseIdentity | None:
    """The identity beside an adapter; None where there is none. ValueError for a damaged file."""
    if not (folder / FILE).is_file():
        return None
    remedy = "it does not say which base model the adapter was trained on"
    return read_fields(BaseIdentity, storage.load_json(folder / FILE), folder / FILE, remedy=remedy)


def check(then: BaseIdentity, model: nn.Module, adapter: str, again: Callable[[str], nn.Module], missing: Collection[str]) -> None:
    """ValueError where a base model is not the one of an adapter.

    Args:
        then: the adapter's.
        model: the base as it was loaded.
        adapter: its folder.
        again: loads the base in the given dtype, where the adapter was trained in another one than the model's.
        missing: names of the parameters that the base model's files lack.
    """
    without = {*then.without, *missing}
    if dtypes_of(model) != then.dtypes and len(then.dtypes) == 1:
        model = again(then.dtypes[0])
    items = [(name, parameter) for name, parameter in model.named_parameters() if name not in without]
    found = digest_of_parameters(model, items)
    if found != then.digest:
        raise ValueError(
            f"the adapter {adapter} was trained on another base model (digest of its weights {then.digest[:12]}…, of these {found[:12]}…): "
            "put the base model of that run where adapter_config.json names it (base_model_name_or_path)."
        )
