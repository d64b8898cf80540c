"""Learning rates found by ``auto`` against grids, and whether ``auto`` holds in set-ups drawn at random.

    python benchmarks/auto_rates.py grid --lm M --encoder E --data_dir D --out runs/auto
    python benchmarks/auto_rates.py random --lm M --encoder E --data_dir D --out runs/auto

``grid``: each combination of method, scheme, model and task once with ``lr="auto", eps="auto"`` and once with each rate of a grid of
seven, a factor of about three apart, at ε 10⁻³. Everything else is equal, the number of sequences evaluated included, of which those
that ``auto`` spends on measuring are a part. What counts is the relative fall (first − last) / first of the loss on all training examples.
``random``: set-ups drawn from a seed; a run counts as diverged if its loss ends more than a twentieth above its start or is not finite, and
as without gain if it ends above its start.

Results are appended to ``results.jsonl``; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from learning import sweep

from zotune.training.samplers import balanced_group_size

#: Combinations of the grid: method, scheme, model, task.
COMBINATIONS = [
    ("lozo-g", "full", "lm", "sst2"),
    ("lozo-g", "full", "lm", "trec"),
    ("lozo-g", "full", "lm", "mr"),
    ("lozo-g", "full", "lm", "rte"),
    ("lozo-e", "full", "lm", "sst2"),
    ("mezo", "full", "lm", "sst2"),
    ("lozo-e", "full", "lm", "trec"),
    ("mezo", "full", "lm", "trec"),
    ("lozo-e", "lora", "lm", "sst2"),
    ("mezo", "lora", "lm", "sst2"),
    ("lozo-e", "full", "encoder", "trec"),
    ("mezo", "full", "encoder", "trec"),
]
RATES = {
    "lozo-g": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0],  # sizes of a step's singular values
    "full": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "lora": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
}
#: So much above its start a loss may end without having diverged.
WITHIN = 0.05
#: What set-ups are drawn from.
METHODS = ["lozo-e", "lozo-e", "lozo", "lozo-m", "mezo", "mezo-momentum", "zo-adamw", "agzo", "es", "fzoo", "tezo", "subzero"]
SCHEMES = ["full", "full", "lora", "head", "prompt"]
BATCHES = [1, 2, 4, 8, 16, 32]
TASKS = {"lm": ["sst2", "mr", "rte", "trec"], "encoder": ["trec", "sst2", "ag_news"]}


def cell(args: argparse.Namespace, method: str, scheme: str, model: str, task: str, **others: Any) -> dict[str, Any]:
    classes = {"sst2": 2, "mr": 2, "rte": 2, "trec": 6, "ag_news": 4}[task]
    batch = others.get("batch_size", 16)
    size = balanced_group_size(classes, batch) if method in ("lozo-e", "lozo-g") else None  # as the trainer has it
    return {
        "model": str(getattr(args, model)),
        "task": task,
        "data_dir": str(args.data_dir),
        "template": None,
        "objective": "similarity" if model == "encoder" else others.pop("objective", "lm"),
        "steps": 0,
        "budget": args.budget,
        "eval_steps": 10**9,
        "num_train": args.num_train,
        "num_dev": 100,
        "schedule": "warmup_stable_decay",
        "threads": args.threads,
        "stratified": True,
        "scheme": scheme,
        "method": method,
        "options": {"num_directions": 3, "directions_per": "group", "group_size": size} if size else {},
        "batch_size": batch,
        "seed": 0,
        "score": "held out",
        "lr": "auto",
        "eps": "auto",
        **others,
    }


def fall(result: dict[str, Any]) -> float:
    """(first − last) / first of the loss over all training examples."""
    first, last = result["whole"][0][1], result["whole"][-1][1]
    return (first - last) / first if last == last else float("-inf")


def grid(args: argparse.Namespace) -> list[str]:
    lines = ["| method | scheme | model, task | best of grid | its fall | fall with auto | auto / best |", "|---|---|---|---|---|---|---|"]
    for combination in COMBINATIONS[: args.first]:
        method, scheme, model, task = combination
        rates = RATES.get(method, RATES[scheme])
        cells = [cell(args, *combination, lr=lr, eps=1e-3) for lr in rates] + [cell(args, *combination)]
        by_rate = {str(r["cell"]["lr"]): fall(r) for r in sweep(cells, args.out / "results.jsonl", args.processes)}
        auto = by_rate.pop("auto")
        best = max(by_rate, key=lambda rate: by_rate[rate])
        print({rate: round(value, 4) for rate, value in by_rate.items()}, "auto", round(auto, 4), flush=True)
        lines.append(
            f"| {combination[0]} | {scheme} | {model}, {task} | {best} | {by_rate[best]:.3f} | {auto:.3f} | {auto / by_rate[best]:.2f} |"
        )
    return lines


def low_rank(method: str) -> bool:
    """Whether a method is for matrices."""
    return method.startswith(("lozo", "agzo", "subzero"))


def drawn(args: argparse.Namespace) -> list[str]:
    source = random.Random(args.seed)
    cells = []
    for _ in range(args.count):
        model = source.choice(["lm", "lm", "encoder"])
        known = [s for s in SCHEMES if s in ("full", "lora") or not all(low_rank(m) for m in args.methods)]
        scheme = source.choice(known[:3] if model == "encoder" else known)
        method = source.choice([m for m in args.methods if scheme in ("full", "lora") or not low_rank(m)])
        task, batch, seed = source.choice(TASKS[model]), source.choice(BATCHES), source.randrange(1000)
        objective = {} if model == "encoder" else {"objective": source.choice(["lm", "choices"])}
        cells.append(cell(args, method, scheme, model, task, batch_size=batch, seed=seed, **objective))
    cells = cells if args.only is None else [cells[number] for number in args.only]
    lines = ["| method | scheme | model, task | objective | batch | loss before | after | |", "|---|---|---|---|---|---|---|---|"]
    for result in sweep(cells, args.out / "results.jsonl", args.processes):
        c, first, last = result["cell"], result["whole"][0][1], result["whole"][-1][1]
        model = "encoder" if c["objective"] == "similarity" else "lm"
        verdict = "" if last <= first else "no gain" if last < (1 + WITHIN) * first else "**diverged**"
        lines.append(
            f"| {c['method']} | {c['scheme']} | {model}, {c['task']} | {c['objective']} | {c['batch_size']} | {first:.3f} | {last:.3f} | "
            f"{verdict} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["grid", "random"])
    parser.add_argument("--lm", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a sentence encoder")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=4800, help="sequences a run evaluates")
    parser.add_argument("--num_train", type=int, default=1000, help="training examples, whose loss is looked at before and after")
    parser.add_argument("--first", type=int, default=len(COMBINATIONS), help="so many of the combinations")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="what set-ups are drawn from; more of one make it likelier")
    parser.add_argument("--count", type=int, default=20, help="set-ups drawn")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the set-ups to run, from 0; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = grid(args) if args.what == "grid" else drawn(args)
    (args.out / f"{args.what}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
