"""From the name of a rule to its class: built-in, of torch, or of pytorch-optimizer."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from zotune.io.suggest import did_you_mean_or
from zotune.methods.rules.ema import EMASGD, RAdaZO
from zotune.methods.rules.jaguar import JaguarMuon, JaguarSign, PersistentSign
from zotune.methods.rules.orthogonal import Orthogonal, PartialOrthogonal
from zotune.methods.rules.sign import Sign

OWN_RULES: dict[str, type[torch.optim.Optimizer]] = {
    rule.__name__: rule for rule in (EMASGD, JaguarMuon, JaguarSign, Orthogonal, PartialOrthogonal, PersistentSign, RAdaZO, Sign)
}


def _classes(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    rules = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {n: v for n, v in rules.items() if issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer}


def _find(name: str, rules: dict[str, Any]) -> Any:
    return next((rules[known] for known in rules if known.lower() == name.lower()), None)


def resolve(rule: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer class of a name: built-in, of torch, or of pytorch-optimizer where that is installed (case does not matter).

    Raises:
        ValueError: the name is unknown (the message names the nearest), or a class is not an optimizer.
    """
    if isinstance(rule, type):
        if not issubclass(rule, torch.optim.Optimizer):
            raise ValueError(f"an update rule must be a torch.optim.Optimizer class, and {rule.__name__} is not.")
        return rule
    known = OWN_RULES | _classes(torch.optim)
    found = _find(rule, known)
    if found is not None:
        return found
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError:
        extra = " (more rules come with `pip install pytorch-optimizer`)"
    else:
        extra = ""
        more = _classes(package)
        found = _find(rule, more)
        if found is not None:
            return found
        known = known | more
    raise ValueError(f"unknown update rule {rule!r}{did_you_mean_or(rule, known, 'known:')}{extra}")
