"""Replay: base weights and a journal make the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune import methods
from zotune.methods import Method
from zotune.optim.journal import Journal
from zotune.optim.optimizer import ZerothOrder
from zotune.weights.digest import digest


def replay(model: nn.Module, journal: str | Path | Journal, *, until: int | None = None, method: Method | None = None) -> ZerothOrder:
    """Rebuild trained weights from the base weights in ``model`` and a journal; exact on the device type of the run.

    Args:
        model: the base model, as it was before the run.
        journal: the run's journal.
        until: stop after so many steps.
        method: the run's method, where it is not one of the registry.

    Returns:
        The optimizer in the state of that step; call its ``remove_hooks()`` to be left with a plain model.

    Raises:
        ValueError: the model is not the journal's base, its parameters are named otherwise, the journal is shorter than ``until``, or it
            has a record that no run writes: the model is then a plain module with the weights of the steps before that record.
    """
    if not isinstance(journal, Journal):
        journal = Journal.open(journal)
    checked_header(journal)
    if until is not None and not 0 <= until <= len(journal):
        raise ValueError(f"the journal holds {len(journal)} steps; step {until} is not among them.")
    optimizer = before_steps(model, journal, method=method)
    try:
        _apply(optimizer, journal, until)
    except BaseException:
        optimizer.remove_hooks()
        raise
    return optimizer


def before_steps(model: nn.Module, journal: Journal, *, method: Method | None = None, known: bool = False) -> ZerothOrder:
    """The optimizer of a journal's run before its first step, to which records can be applied.

    Args:
        model, journal, method: as of :func:`replay`.
        known: the weights are those of the journal's base; they are not read to find out.

    Raises:
        ValueError: as :func:`replay`.
    """
    header = checked_header(journal)
    found = header["base"] if known else digest(model)
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
        {
            "params": [parameters[name] for name, _, _ in group["parameters"]],
            "weight_decay": group["weight_decay"],
            "anchor_decay": group.get("anchor_decay", 0.0),
        }
        for group in header["groups"]
    ]
    try:
        method = method or methods.get(header["method"], **header["options"])
        return ZerothOrder(model, method, params=groups, seed=header["seed"])
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:  # options of types that no run has
        raise ValueError(f"{journal.path}: the header's method cannot be made ({error}).") from error


def _apply(optimizer: ZerothOrder, journal: Journal, until: int | None) -> None:
    for number, record in enumerate(journal.records()):
        if until is not None and optimizer.steps >= until:
            break
        try:
            optimizer.apply(record)
        except torch.OutOfMemoryError:
            raise
        except (
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RuntimeError,
        ) as error:  # whole, yet none that a run writes
            raise ValueError(
                f"{journal.path}: record {number} is none of a run of {optimizer.method.name} ({' '.join(str(error).split())})."
            ) from error


def checked_header(journal: Journal) -> dict[str, Any]:
    """A journal's header, checked to be that of a run.

    Raises:
        ValueError: an entry is missing or of another type.
    """
    header = journal.header
    try:
        whole = all(isinstance(header[key], kind) for key, kind in _HEADER.items()) and all(
            isinstance(group["weight_decay"], int | float)
            and isinstance(group.get("anchor_decay", 0.0), int | float)
            and all(isinstance(name, str) and isinstance(dtype, str) for name, _, dtype in group["parameters"])
            for group in header["groups"]
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not header["groups"]:
        raise ValueError(f"{journal.path}: the journal's header is not that of a run of this version of zotune.")
    return header


_HEADER = {"base": str, "method": str, "options": dict, "seed": int, "groups": list, "device": list}
