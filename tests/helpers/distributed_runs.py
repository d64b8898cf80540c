"""Runs in one process and, by `torchrun tests/helpers/distributed_runs.py OUT all|some`, in several.

Every process writes what its runs were like to OUT/rank-N.json: coefficients, digests of its state after each step, weights.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import forked
import reward_toys
import toys
import zotune
from zotune.optim.distributed import Workers
from zotune.optim.distributed.agreement import state_digest

STEPS = 3
ROWS = 8

#: Runs beside those of every method: name -> (method, options, workers, kind of loss)
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "four directions, by directions": ("lozo", {"num_directions": 4}, {"parallelism": "directions"}, "each"),
    "four directions, by both": ("mezo", {"num_directions": 4}, {"parallelism": "both"}, "each"),
    "a scalar loss": ("mezo", {}, {}, "scalar"),
    "a scalar loss, four directions": ("lozo", {"num_directions": 4}, {}, "scalar"),
    "a closure": ("lozo", {}, {}, "closure"),
    "micro-batches": ("lozo", {}, {}, "parts"),
    "uneven micro-batches": ("lozo", {"directions_per": "example"}, {}, "uneven"),
    "groups": ("lozo", {"directions_per": "group", "group_size": 2}, {}, "each"),
    "groups of uneven size": ("lozo", {"directions_per": "group", "group_size": 3}, {}, "each"),
    "two directions an example": ("lozo", {"num_directions": 2, "directions_per": "example", "estimator": "forward"}, {}, "each"),
    "batches of their own": ("lozo", {}, {}, "own"),
    "batches of their own, a direction an example": ("lozo", {"directions_per": "example"}, {}, "own"),
    "more workers than examples": ("lozo", {"num_directions": 2}, {}, "few"),
    "sampled rewards": ("lozo", {"num_directions": 2, "eps": 0.1}, {"parallelism": "both"}, "reward"),
    "measured": ("lozo", {"eps": "auto", "lr": "auto"}, {}, "each"),
    "measured, a direction an example": ("lozo-e", {"eps": "auto", "lr": "auto"}, {}, "each"),
    "measured, mezo-adam": ("mezo-adam", {"eps": "auto", "lr": "auto"}, {}, "each"),
}


def names(which: str) -> list[str]:
    if which == "all":
        return [*toys.names(), *OTHERS]
    return ["agzo", "lozo-e", "mezo-svrg", *[name for name in OTHERS if not name.startswith("measured")]]


def run(name: str) -> dict[str, Any]:
    """A short run; what it was like."""
    method_name, options, shared, kind = OTHERS.get(name, (name, {}, {}, "each"))
    options = dict(options)
    lr = options.pop("lr", 1e-2)
    workers = Workers(**shared, check_every=1)
    model = reward_toys.model() if kind == "reward" else toys.classifier()
    each = toys.loss_function(model) if kind != "reward" else reward_toys.loss_of(model, temperature=1.0)
    optimizer = zotune.ZerothOrder(model, toys.method(method_name, **options), lr=lr, seed=5, workers=workers)
    found: dict[str, Any] = {"coefficients": [], "losses": [], "digests": [], "counts": [], "lr": []}
    for step in range(STEPS):
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
        elif kind == "reward":
            optimizer.step(each, each.keyed(reward_toys.batch(), 5, step))
        else:
            optimizer.step(each, batch)
        assert optimizer.last_report is not None
        found["coefficients"].append(optimizer.last_report.coefficients.tolist())
        found["losses"].append(optimizer.last_report.loss)
        found["lr"].append(optimizer.last_report.lr)
        found["counts"].append([optimizer.forward_passes, optimizer.sequences_evaluated])
        found["digests"].append(state_digest(optimizer.run))
    found["eps"] = optimizer.eps
    optimizer.remove_hooks()
    found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return found


def mistakes() -> dict[str, str]:
    """What each of a few mistakes on the last rank leads to, as this rank is told."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    told: dict[str, str] = {}

    def attempt(
        name: str, *, later: int = 0, seed: int = 0, method: str = "lozo", lr: float = 1e-2, batch: int = 0, batches: str = "same"
    ) -> None:
        model = toys.classifier()
        workers = Workers(batches=batches, check_every=0 if name == "later batch" else 2)
        model.register_buffer("mean", torch.full((2,), float(name == "buffers" and rank == last)))
        optimizer = zotune.ZerothOrder(model, method, lr=lr, seed=seed, workers=workers)
        try:
            for step in range(3):
                if name == "weights" and step == 1 and rank == last:
                    next(model.parameters()).data.view(-1)[3] += 1e-3
                optimizer.step(toys.loss_function(model), toys.batch(8, seed=step + (batch if step >= later else 0)))
            told[name] = "nothing"
        except RuntimeError as error:
            told[name] = f"{type(error).__name__}: {error}"
        optimizer.remove_hooks()

    wrong = rank == last
    attempt("none")
    attempt("seed", seed=int(wrong))
    attempt("method", method="mezo" if wrong else "lozo")
    attempt("lr", lr=2e-2 if wrong else 1e-2)
    attempt("batch", batch=int(wrong))
    attempt("later batch", batch=int(wrong), later=2)
    attempt("buffers")
    attempt("batches of their own", batch=int(wrong), batches="auto")
    attempt("weights")
    return told


def lost() -> str:
    """What the others are told when the last rank has ended."""
    if dist.get_rank() == dist.get_world_size() - 1:
        dist.destroy_process_group()
        return "nothing"
    try:
        Workers().wait()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def traffic() -> dict[str, int]:
    """Bytes that this rank sends in a plain step."""
    found = {}
    for method in ("lozo", "lozo-e"):
        model = toys.classifier()
        workers = Workers(batches="same", check_every=0)
        optimizer = zotune.ZerothOrder(model, toys.method(method, num_directions=1 if method == "lozo" else 2), lr=1e-2, workers=workers)
        for step in range(2):
            before = workers.bytes_sent
            optimizer.step(toys.loss_function(model), toys.batch(ROWS, seed=step))
        found[method] = workers.bytes_sent - before
        optimizer.remove_hooks()
    return found


def main(out: Path, which: str) -> None:
    dist.init_process_group(*(["gloo"] if which == "all" else []))  # also one whose backend is "undefined"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {name: run(name) for name in names(which)}
    found |= {"mistakes": mistakes(), "traffic": traffic()}
    rank = dist.get_rank()
    if which == "some":
        found["lost"] = lost()
    else:
        forked.leave()
    (out / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
