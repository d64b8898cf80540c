"""Runs over sharded weights: `torchrun tests/helpers/sharded_runs.py OUT` on two processes writes OUT/rank-N.json."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import forked
import toys
import zotune
from zotune.optim.distributed.agreement import state_digest

METHODS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "lozo": {"rank": 2, "interval": 2},
    "fzoo": {},
}
STEPS = 4


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = blocks(model)
    for index in (0, 1, 4):
        fully_shard(model[index], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def blocks(model: nn.Module) -> nn.Module:
    """The model with its layers in blocks of their own, which are what FSDP2 gathers; it gives the model other names too."""
    for index in (0, 1, 4):
        model[index] = nn.Sequential(model[index])
    return model


def run(method: str, model: nn.Module, journal: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "digests": []}
    optimizer = zotune.ZerothOrder(
        model, zotune.methods.get(method, eps=1e-3, **METHODS[method]), lr=1e-3 if method == "fzoo" else 1e-2, seed=4, journal=journal
    )
    loss_fn = toys.loss_function(model)
    for step in range(STEPS):
        optimizer.step(loss_fn, toys.batch(8, seed=step))
        assert optimizer.last_report is not None
        found["losses"].append(optimizer.last_report.loss)
        found["digests"].append(state_digest(optimizer.run))
    optimizer.remove_hooks()
    with torch.no_grad():
        found["after"] = float(loss_fn(toys.batch(8)).mean())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    found["weights"] = torch.cat([p.detach().float().flatten() for p in whole]).tolist()
    return found


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for method in METHODS:
            name = f"{method} {dtype}"
            model = sharded(toys.classifier(dtype))
            rows = {name: list(p.to_local().shape) for name, p in model.named_parameters()}
            found[name] = run(method, model, out / f"{name}.zo") | {"rows": rows}
    found["refused"] = {}
    for method in ("mezo-adam", "lozo-e"):
        try:
            zotune.ZerothOrder(sharded(toys.classifier()), method, lr=1e-3)
        except ValueError as error:
            found["refused"][method] = str(error)
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    forked.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
