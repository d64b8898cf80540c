"""Replay: base weights and a journal make the trained weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zotune import methods
from zotune.journal import Journal, digest
from zotune.methods import Method
from zotune.optimizer import ZerothOrder


def replay(model: nn.Module, journal: str | Path | Journal, *, until: int | None = None, method: Method | None = None) -> ZerothOrder:
    """Rebuild trained weights from the base weights in ``model`` and a journal; exact on the device type of the run.

    Args:
        model: the base model, as it was before the run.
        journal: the run's journal.
        until: stop after so many steps.
        method: the run's method, where it is not one of the registry.

    Returns:
        The optimiser in the state of that step; call its ``detach()`` to be left with a plain model.

    Raises:
        ValueError: the model is not the journal's base, its parameters are named otherwise, or the journal is shorter than ``until``.
    """
    if not isinstance(journal, Journal):
        journal = Journal.open(journal)
    header = journal.header
    if until is not None and not 0 <= until <= len(journal):
        raise ValueError(f"the journal holds {len(journal)} steps; step {until} is not among them.")
    found = digest(model)
    if found != header["base"]:
        raise ValueError(
            f"this model is not the one the journal starts from (digest {found[:12]}…, journal {header['base'][:12]}…); give the base "
            "model of that run, in the dtype of that run."
        )
    parameters = dict(model.named_parameters())
    trained = [name for group in header["groups"] for name, _, _ in group["parameters"]]
    missing = [name for name in trained if name not in parameters]
    if missing:
        raise ValueError(f"the journal trains {missing[0]!r}, which this model does not have.")
    groups = [
        {"params": [parameters[name] for name, _, _ in group["parameters"]], "weight_decay": group["weight_decay"]}
        for group in header["groups"]
    ]
    method = method or methods.get(header["method"], **header["options"])
    optimizer = ZerothOrder(model, method, params=groups, seed=header["seed"])
    for record in journal.records():
        if until is not None and optimizer.steps >= until:
            break
        optimizer.apply(record)
    return optimizer
