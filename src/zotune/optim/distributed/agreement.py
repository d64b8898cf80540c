"""Comparison of all workers: digests of weights, settings and batches, so that they take the same steps."""

from __future__ import annotations

from typing import Any

from zotune.errors import RankMismatchError
from zotune.optim import saved_state
from zotune.optim.construction import RunParts
from zotune.optim.distributed.workers import batch_digest, odd_ranks, other_batch
from zotune.weights.digest import buffers_digest, digest, digest_of
from zotune.weights.placement import is_sharded

#: What is compared, in the order of the reports, and the fix for a difference.
_CAUSES = {
    "method": "start every worker with the same method and options",
    "seed": "start every worker with the same seed",
    "step": "resume every worker from the same checkpoint",
    "lr": "give every worker the same learning rate and schedule",
    "weights": "load the same model on every worker, with the same versions, on the same type of device",
    "buffers": "load the same model on every worker, batch statistics and all other buffers included",
}


def settle(run: RunParts, batch: Any) -> None:
    """Compare all workers before a step; at the first, also determine whether their batches are the same.

    Args:
        batch: the step's micro-batches; None for a closure.

    Raises:
        RankMismatchError: names what differs, and the ranks that differ from the majority.
    """
    workers = run.workers
    state = {**_state(run), "batch": None if batch is None else batch_digest(batch)}
    everybody = workers.exchange(state)
    for name, cure in _CAUSES.items():
        odd = odd_ranks([str(found[name]) for found in everybody])
        if odd:
            ranks = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
            raise RankMismatchError(f"{ranks} from the other workers in {name} before step {run.state.steps}: {cure}.")
    alike = len({found["batch"] for found in everybody}) == 1
    if workers.batches == "auto":
        workers.batches = "same" if alike and batch is not None and None not in batch else "own"
        if workers.batches == "own" and workers.parallelism in ("directions", "both"):
            raise RankMismatchError(
                f"parallelism={workers.parallelism!r} needs workers with the same batch, and theirs differ: give all of them the whole "
                "batch, or set parallelism='data'."
            )
    elif workers.batches == "same" and not alike:
        raise other_batch(odd_ranks([str(found["batch"]) for found in everybody]), run.state.steps)


def _state(run: RunParts) -> dict[str, Any]:
    numbers = saved_state.save(run)["zotune"]
    return {
        "method": [numbers["method"], repr(sorted(numbers["options"].items(), key=str))],
        "seed": numbers["seed"],
        "step": numbers["steps"],
        "lr": run.rates(),
        "weights": state_digest(run),
        "buffers": buffers_digest(run.model),
    }


def state_digest(run: RunParts) -> str:
    """A digest of the model's weights and of all other trained state: pending updates, moments, snapshots.

    It leaves out residuals of sharded weights, of which every worker has its own.
    """
    own = {f"coordinate/{c.name}/residual" for c in run.forward.coordinates if is_sharded(c.parameter)}
    state = {name: tensor for name, tensor in saved_state.save(run)["state"].items() if name not in own}
    return digest_of({"": digest(run.model), **state})
