"""Steps a second in one process and in several, at the same global batch, one thread each.

    python benchmarks/processes.py --processes 2 --methods lozo lozo-e mezo

Runs of one process and of several alternate, since a machine's load changes; what counts are medians over the rounds. Beside the time on
the clock stands the processor time of a step (the most that one process takes): the clock on a machine that does nothing else cannot
be faster, and it is the steadier of the two where others compute beside us.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def worker(args: argparse.Namespace) -> None:
    """One process of a run: takes steps, and writes how long each took."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import zotune
    from zotune import bundled

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for method in args.methods:
        model = AutoModelForCausalLM.from_pretrained(bundled.path("tiny-lm"), dtype=torch.float32)
        optimizer = zotune.ZerothOrder(model, zotune.methods.get(method, eps=1e-3), lr=1e-4, seed=0)

        def loss_fn(ids: torch.Tensor, model: Any = model) -> torch.Tensor:
            logits = model(input_ids=ids).logits[:, :-1].float()
            return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)

        generator = torch.Generator().manual_seed(0)
        wall, cpu = [], []
        sent = 0
        for step in range(args.steps + args.warmup):
            ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), generator=generator)
            before = optimizer.workers.bytes_sent
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            optimizer.step(loss_fn, ids)
            if step >= args.warmup:
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
                sent = optimizer.workers.bytes_sent - before
        found[method] = {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "bytes": sent}
        optimizer.remove_hooks()
    Path(args.out, f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(args: argparse.Namespace, processes: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by method: on the clock, and of the processor."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__, "--worker"]
        words += ["--out", out, "--steps", str(args.steps), "--warmup", str(args.warmup), "--batch", str(args.batch)]
        words += ["--length", str(args.length), "--methods", *args.methods]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads(path.read_text()) for path in Path(out).glob("rank-*.json")]
    return {m: {kind: max(rank[m][kind] for rank in ranks) for kind in ("wall", "cpu", "bytes")} for m in args.methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["lozo", "lozo-e", "mezo"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    rounds: dict[int, list[dict[str, dict[str, float]]]] = {1: [], args.processes: []}
    for number in range(args.rounds):
        for processes, kept in rounds.items():
            kept.append(launch(args, processes))
            print(f"round {number + 1}, {processes} process(es): load {os.getloadavg()[0]:.1f}, {kept[-1]}", flush=True)
    print(f"\n{args.batch} x {args.length} tokens, medians over {args.rounds} rounds of {args.steps} steps; load {os.getloadavg()[0]:.1f}")
    print("method      | s/step, 1 | clock | speed-up | processor, 1 | processor | speed-up | bytes per step")
    for method in args.methods:
        one, several = (
            {kind: statistics.median(found[method][kind] for found in rounds[p]) for kind in ("wall", "cpu", "bytes")}
            for p in (1, args.processes)
        )
        print(
            f"{method:<11} | {one['wall']:9.3f} | {several['wall']:5.3f} | {one['wall'] / several['wall']:8.2f} | {one['cpu']:12.3f} | "
            f"{several['cpu']:9.3f} | {one['cpu'] / several['cpu']:8.2f} | {several['bytes']:.0f}"
        )


if __name__ == "__main__":
    main()
