"""The peak memory of training steps under the ledger: predicted by a dry run, or measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zotune.baselines import Baseline, optimizer_class
from zotune.io.caches import clear_tensor_caches
from zotune.memory.dry_run import dry_run
from zotune.memory.ledger import Ledger, Split
from zotune.memory.shapes import build, depth_of, shallow
from zotune.memory.workload import Workload, batch_of, other_phases, prepared, trains
from zotune.objectives.losses import objective
from zotune.optim.optimizer import ZerothOrder

#: Steps to run: the first allocates states, the second has them already.
STEPS = 2
#: Layers of the two shallow models whose peaks are extrapolated.
DEPTHS = (1, 2)


def estimate(workload: Workload, *, accelerator: bool = False, exact: bool = False) -> Split:
    """The predicted peak of training, from dry runs of steps: no weight is read or allocated.

    The layers of a model are alike, so that memory is linear in their number at each moment of a step (forward, backward, update). The
    peaks of two shallow models are extrapolated, which takes seconds whatever the depth.

    Args:
        workload: what is trained.
        accelerator: allocate as on a GPU; otherwise as on a CPU.
        exact: run all layers.

    Raises:
        ValueError: the method does not apply to what the scheme trains, or the model cannot take the batch.
    """
    depth = depth_of(workload.config)
    if exact or depth <= 2 * DEPTHS[1]:
        return _highest(_dry_peaks(workload, accelerator))
    few, more = (_dry_peaks(workload.with_(config=shallow(workload.config, layers)), accelerator) for layers in DEPTHS)
    return _highest({moment: _extrapolated(few[moment], more[moment], depth) for moment in more if moment in few})


def _dry_peaks(workload: Workload, accelerator: bool) -> dict[str, Split]:
    peaks: dict[str, Split] = {}
    for place, one in enumerate([workload, *other_phases(workload)]):
        with dry_run(accelerator=accelerator):
            model = prepared(build(one.config, one.dtype, masked=one.masked), one)
            found, _ = run(model, one, batch_of(one), host=not accelerator)
            peaks |= {f"{moment} {place}": split for moment, split in found.items()}
    return peaks


def _highest(peaks: Mapping[str, Split]) -> Split:
    return max(peaks.values(), key=lambda split: split.total)


def _extrapolated(few: Split, more: Split, depth: int) -> Split:
    """Linear extrapolation of the peaks at two depths."""
    steps = (depth - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
    return Split({kind: max(0, round(size + steps * (size - few.kinds[kind]))) for kind, size in more.kinds.items()}, more.largest)


def measure(
    workload: Workload, device: torch.device | str = "cpu", model: nn.Module | None = None, ledger: bool = True, strict: bool = False
) -> Split:
    """The peak of real steps, on random weights or a given model; without a ledger the steps run and nothing is counted."""
    if model is None:
        model = build(workload.config, workload.dtype, masked=workload.masked).to(device)
    model, host = prepared(model, workload), torch.device(device).type == "cpu"
    batch = {name: tensor.to(device) for name, tensor in batch_of(workload).items()}
    peaks, optimizer = run(model, workload, batch, ledger=ledger, host=host, strict=strict)
    if optimizer is not None:
        optimizer.remove_hooks()
    for place, other in enumerate(other_phases(workload)):
        more, optimizer = run(model, other, batch, ledger=ledger, host=host, strict=strict)
        optimizer.remove_hooks()
        peaks = peaks | {f"{moment} {place}": split for moment, split in more.items()}
    return _highest(peaks)


def run(
    model: nn.Module, workload: Workload, batch: Mapping[str, Tensor], *, ledger: bool = True, host: bool = True, strict: bool = False
) -> tuple[dict[str, Split], Any]:
    """The splits at the peaks of ``STEPS`` steps by moment, and the optimizer (None where nothing is trained).

    ``host``, ``strict``: as in :class:`Ledger`.
    """
    clear_tensor_caches()  # so that the direction tables count, whatever ran before
    counted = Ledger(model, host, strict)
    counted.add(batch.values(), "temporary")
    loss = objective("mlm" if workload.masked else "classifier" if "labels" in batch else "lm", model)
    with counted if ledger else contextlib.nullcontext():
        optimizer = _steps(model, workload, loss, batch, counted)
        return counted.peaks(), optimizer


def _steps(
    model: nn.Module, workload: Workload, loss: Callable[[Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor], counted: Ledger
) -> Any:
    method = workload.method
    if not trains(method):
        with torch.no_grad():
            model.eval()
            loss(batch)
        return None
    with counted.phase("optimizer state"):
        rate = 1e-6
        optimizer: Any
        if isinstance(method, Baseline):
            optimizer = optimizer_class(method)(model, method, lr=rate, max_steps=STEPS)
        else:
            rows = len(next(iter(batch.values())))
            # Examples beyond the batch are kept on the host: on a device they cost no more than their forwards.
            examples = (lambda _, count: [batch] * -(-count // rows)) if counted.host else None
            batching, decay = workload.forward_batching, workload.anchor_decay
            optimizer = ZerothOrder(model, method, lr=rate, anchor_decay=decay, forward_batching=batching, sample_batches=examples)
    for _ in range(STEPS):
        counted.begin_step()
        optimizer.step(loss, batch)
    return optimizer
