"""What methods learn by prompts with a mask from the same number of sequences: accuracy before and after, three seeds.

    python benchmarks/masked_model.py --data_dir D --out masked-minilm
    python benchmarks/masked_prompts.py --model masked-minilm --data_dir D --results benchmarks/results/masked_prompts.jsonl

256 training examples, batch 16, one schedule; rate and eps are measured from the run's own losses, which counts. Accuracy is that of
200 rows of the evaluation split. Runs on file are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from learning import sweep

CLASSES = {"sst2": 2, "trec": 6}


def cell(args: argparse.Namespace, task: str, method: str, seed: int) -> dict[str, Any]:
    sets = {"num_directions": 3, "directions_per": "group", "group_size": CLASSES[task]}  # of drawn directions, as the trainer has it
    return {
        "model": str(args.model),
        "task": task,
        "data_dir": str(args.data_dir),
        "template": None,
        "objective": "mlm",
        "steps": 0,
        "budget": args.budget,
        "eval_steps": 10**9,
        "num_train": 256,
        "num_dev": None,
        "schedule": "warmup_stable_decay",
        "threads": 1,
        "stratified": True,
        "method": method,
        "options": sets if method == "lozo-g" else {},
        "batch_size": 16,
        "seed": seed,
        "end_only": seed > 0,  # before training all seeds have the same accuracy
        "score": "validation",
        "num_eval": args.num_eval,
        "lr": "auto",
        "eps": "auto",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["mezo", "lozo", "lozo-g"])
    parser.add_argument("--tasks", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--budget", type=int, default=1200, help="sequences a run evaluates")
    parser.add_argument("--num_eval", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for task in args.tasks:
        print(f"\n| {task} | accuracy before | after | training loss before | after |\n|---|---|---|---|---|")
        for method in args.methods:
            found = sweep([cell(args, task, method, seed) for seed in range(args.seeds)], args.results, 1)
            first = next(r for r in found if not r["cell"]["end_only"])
            accuracy, loss = mean([100 * r["accuracy"] for r in found]), mean([r["whole"][-1][1] for r in found])
            print(f"| `{method}` | {100 * first['zero_shot']:.2f} | {accuracy} | {first['whole'][0][1]:.2f} | {loss} |", flush=True)


def mean(numbers: list[float]) -> str:
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{spread}"


if __name__ == "__main__":
    main()
