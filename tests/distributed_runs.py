"""Runs that the tests of several processes take in one process, and each process of theirs by `torchrun tests/distributed_runs.py`.

Every process writes what it ended with to OUT/rank-N.json: digests after each step, coefficients, weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys

import zotune
from zotune import methods
from zotune.distributed import Workers
from zotune.distributed.agreement import state_digest

STEPS = 4
ROWS = 8

#: Runs beside those of every method: name -> (method, options, workers, kind of loss)
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "four directions, by directions": ("lozo", {"num_directions": 4}, {"share": "directions"}, "each"),
    "four directions, by both": ("mezo", {"num_directions": 4}, {"share": "both"}, "each"),
    "a scalar loss": ("mezo", {}, {}, "scalar"),
    "a scalar loss, four directions": ("lozo", {"num_directions": 4}, {}, "scalar"),
    "a closure": ("lozo", {}, {}, "closure"),
    "micro-batches": ("lozo", {}, {}, "parts"),
    "uneven micro-batches": ("lozo", {"num_directions": "example"}, {}, "uneven"),
    "sets": ("lozo", {"num_directions": "sets:2"}, {}, "each"),
    "groups": ("lozo", {"num_directions": "groups:3"}, {}, "each"),
    "two directions an example": ("lozo", {"num_directions": "example:2", "estimator": "forward"}, {}, "each"),
    "batches of their own": ("lozo", {}, {}, "own"),
    "batches of their own, a direction an example": ("lozo", {"num_directions": "example"}, {}, "own"),
    "more workers than examples": ("lozo", {"num_directions": 2}, {}, "few"),
    "measured": ("lozo", {"eps": "auto", "lr": "auto"}, {}, "each"),
    "measured, a direction an example": ("lozo-e", {"eps": "auto", "lr": "auto"}, {}, "each"),
    "measured, mezo-adam": ("mezo-adam", {"eps": "auto", "lr": "auto"}, {}, "each"),
}


def names() -> list[str]:
    return [*methods.names(), *OTHERS]


def run(name: str, workers: Workers | None = None, watch: bool = True, steps: int = STEPS) -> dict[str, Any]:
    """A short run; what it was like."""
    method_name, options, shared, kind = OTHERS.get(name, (name, {}, {}, "each"))
    options = dict(options)
    lr = options.pop("lr", 1e-2)
    workers = workers or Workers(**shared, check_every=1)
    model = toys.classifier()
    each = toys.loss_function(model)
    optimizer = zotune.ZerothOrder(model, toys.method(method_name, **options), lr=lr, seed=5, workers=workers)
    found: dict[str, Any] = {"coefficients": [], "losses": [], "digests": [], "counts": [], "lr": []}
    for step in range(steps):
        batch = toys.batch(3 if kind == "few" else ROWS, seed=step)
        if kind == "scalar":
            optimizer.step(lambda part: each(part).mean(), batch)
        elif kind == "closure":
            optimizer.step(lambda batch=batch: each(batch).mean())
        elif kind in ("parts", "uneven"):
            cut = 4 if kind == "parts" else 3
            optimizer.step(each, [tuple(x[:cut] for x in batch), tuple(x[cut:] for x in batch)])
        elif kind == "own":
            mine = slice(ROWS * workers.rank // workers.size, ROWS * (workers.rank + 1) // workers.size)
            optimizer.step(each, tuple(x[mine] for x in batch))
        else:
            optimizer.step(each, batch)
        assert optimizer.last is not None
        found["coefficients"].append(optimizer.last.coefficients.tolist())
        found["losses"].append(optimizer.last.loss)
        found["lr"].append(optimizer.last.lr)
        found["counts"].append([optimizer.forward_passes, optimizer.sequences_evaluated])
        if watch:
            found["digests"].append(state_digest(optimizer))
    found["eps"] = optimizer.eps
    optimizer.detach()
    found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return found


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    import warnings

    warnings.simplefilter("ignore")
    found = {name: run(name) for name in names()}
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
