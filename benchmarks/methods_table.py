"""What every zeroth-order method learns from the same number of forward passes: full weights and LoRA, three seeds.

    python benchmarks/methods_table.py --model M --data_dir D --task sst2 --results benchmarks/results/methods_sst2.jsonl

Every run evaluates the same number of sequences, those of measuring the rate included. Where the rate can be measured it is (``lr="auto",
eps="auto"``: nothing is tuned by hand); where it cannot, a grid is run with the first seed: a decade apart, up to where the loss no longer
falls, then three times the best and a third of it. The best by the loss of the training examples goes on with the other seeds. Accuracy is
that of examples held out of the training data. Memory is that of a step as ``zotune estimate`` predicts it, seconds are of the run over its
steps on a machine that did other things too.

Runs on file are not repeated, so a table can be made of what there is at any time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learning import HELD_OUT, sweep

from zotune import methods
from zotune.optim.calibration.gains import measurable

RATES = [1e-5, 1e-4, 1e-3, 1e-2]
#: What a method needs on a small model. MeZO-SVRG's step at an anchor is a thousand times its others in the paper, where those are 1e-6.
OPTIONS = {"mezo-svrg": {"anchor_ratio": 1.0}}


def cell(args: argparse.Namespace, method: str, scheme: str, lr: float | str, seed: int) -> dict[str, Any]:
    sets = method in ("lozo-e", "lozo-g")  # as the trainer has it for two classes
    return {
        "model": str(args.model),
        "task": args.task,
        "data_dir": str(args.data_dir),
        "template": None,
        "objective": "lm",
        "steps": 0,
        "budget": args.budget,
        "eval_steps": 10**9,
        "num_train": args.num_train,
        "num_dev": args.num_dev,
        "schedule": "warmup_stable_decay",
        "threads": 1,
        "stratified": True,
        "scheme": scheme,
        "method": method,
        "options": {"num_directions": 3, "directions_per": "group", "group_size": args.classes} if sets else OPTIONS.get(method, {}),
        "batch_size": 16,
        "seed": seed,
        "end_only": True,
        "score": HELD_OUT,
        "lr": lr,
        "eps": "auto" if lr == "auto" else 1e-3,
    } | ({"max_tokens": args.max_tokens} if args.max_tokens else {})


def last(result: dict[str, Any]) -> float:
    """The loss of all training examples at the end, infinite for a run that broke off."""
    loss = result["whole"][-1][1]
    return loss if loss == loss else float("inf")


def runs(args: argparse.Namespace, name: str, scheme: str) -> list[dict[str, Any]]:
    """A row's runs, one a seed."""
    rate = "auto" if measurable(methods.get(name)) else tuned(args, name, scheme)
    return sweep([cell(args, name, scheme, rate, seed) for seed in range(args.seeds)], args.results, args.processes)


def tuned(args: argparse.Namespace, name: str, scheme: str) -> float:
    """The best rate of the grid."""

    def best(rates: list[float]) -> float:
        tried = sweep([cell(args, name, scheme, rate, 0) for rate in rates], args.results, args.processes)
        return float(min(tried, key=last)["cell"]["lr"])

    rates = list(RATES)
    while best(rates) == rates[-1] < 1:
        rates.append(float(f"{10 * rates[-1]:.0e}"))
    middle = best(rates)
    return best([*rates, *(float(f"{factor * middle:.0e}") for factor in (1 / 3, 3))])


def mean(numbers: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{spread}"


def rows(args: argparse.Namespace) -> Iterator[str]:
    yield "| method | scheme | rate | training loss | accuracy | memory of a step | s per step |"
    yield "|---|---|---|---|---|---|---|"
    for scheme in args.schemes:
        for name in args.methods:
            problem = refused(args, name, scheme)
            if problem:
                yield f"| `{name}` | {scheme} | refused | | | | |"
                continue
            found = runs(args, name, scheme)
            seconds = statistics.median(r["step_seconds"] for r in found)
            yield (
                f"| `{name}` | {scheme} | {found[0]['cell']['lr']} | {mean([last(r) for r in found])} | "
                f"{mean([r['accuracy'] for r in found])} | {memory(args, name, scheme)} | {seconds:.2f} |"
            )


def refused(args: argparse.Namespace, name: str, scheme: str) -> str | None:
    """Why a method makes no sense on what a scheme trains."""
    import torch
    from transformers import AutoModelForCausalLM

    from zotune.training import schemes

    with torch.random.fork_rng():
        model = schemes.apply(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), scheme)
    return schemes.refusal(methods.get(name), model, schemes.Scheme(scheme))


def memory(args: argparse.Namespace, name: str, scheme: str) -> str:
    from transformers import AutoConfig

    from zotune.memory import Workload, estimate
    from zotune.training.schemes import Scheme

    config = AutoConfig.from_pretrained(args.model)
    plan = Workload(config, methods.get(name), batch_size=16, sequence_length=64, scheme=Scheme(scheme), forward_batching="sequential")
    return f"{estimate(plan).total / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=methods.names())
    parser.add_argument("--schemes", nargs="+", default=["full", "lora"])
    parser.add_argument("--budget", type=int, default=1200, help="sequences a run evaluates")
    parser.add_argument("--num_train", type=int, default=400)
    parser.add_argument("--num_dev", type=int, default=100, help="training examples held out")
    parser.add_argument("--max_tokens", type=int, help="leave out examples with longer prompts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    for row in rows(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
