"""Loss and accuracy under differential privacy, beside DP-SGD by Opacus at the same ε and the same number of sequences, on SST-2.

    pip install opacus
    python benchmarks/private.py --data_dir data --results benchmarks/results/private.jsonl

All runs draw each of n examples with probability B/n, spend ε at δ = 1e-5 (add or remove one), by one accountant (dp-accounting), and
evaluate the same number of sequences; a backward pass counts as two forward passes. Each row's rate is the best of its grid at the largest
ε with the first seed, by the loss of private examples, and is kept for the other ε; a search counts for nothing in ε, for no row. The
clipping bound of a zeroth-order row is the 75 % quantile of |c_i| of 64 examples that take no part; of DP-SGD it is that of the gradients'
lengths. Opacus trains all Linear layers but the output layer, or a LoRA adapter; embeddings are tied to the output layer, which its hooks
do not allow for.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune
from zotune import bundled, objectives
from zotune.forward.losses import evaluation
from zotune.optim import accounting
from zotune.subspaces.coordinate import Offset
from zotune.tasks import prepare
from zotune.training import schemes

DELTA, PUBLIC, HELD_OUT, EPS = 1e-5, 64, 400, 1e-3
#: Private examples whose loss is evaluated; tokens of a prompt, at most.
EVALUATED, LONGEST = 500, 24
#: Row → rates of its search.
ROWS: dict[str, tuple[float, ...]] = {
    "mezo": (3e-5, 1e-4, 3e-4),
    "lozo": (1e-4, 3e-4, 1e-3),
    "DP-SGD (AdamW), Linear layers": (1e-4, 3e-4, 1e-3),
    "DP-SGD (AdamW), LoRA": (3e-4, 1e-3, 3e-3),
}


class Data:
    """Private, public and held-out examples, and their losses."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = str(bundled.path("tiny-lm"))
        model = self.model()
        task: dict[str, Any] = {
            "task": "sst2",
            "data_dir": args.data_dir,
            "objective": "lm",
            "num_train": 20_000,
            "seed": 0,
        }
        data = prepare(AutoTokenizer.from_pretrained(self.path), model.config, num_dev=4 * HELD_OUT, parts=("train",), **task)
        assert data.train is not None and data.dev is not None
        train, dev = ([row for row in rows if len(row["prompt_ids"]) <= LONGEST] for rows in (data.train, data.dev))
        self.train, self.public, self.dev = train[: args.examples], train[args.examples : args.examples + PUBLIC], dev[:HELD_OUT]
        assert len(self.public) == PUBLIC and len(self.dev) == HELD_OUT
        self.collate, self.collate_eval = data.collate_train, data.collate_eval

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def batch(self, rows: list[int]) -> Any:
        return self.collate([self.train[row] for row in rows])

    def results(self, model: nn.Module) -> dict[str, float]:
        """Loss of private examples, accuracy of the held-out ones."""
        loss_fn, right, total = objectives.objective("lm", model), 0, 0.0
        with torch.inference_mode():
            for at in range(0, EVALUATED, 50):
                total += float(loss_fn(self.collate(self.train[at : at + 50])).double().sum())
            for at in range(0, len(self.dev), 64):
                batch = self.collate_eval(self.dev[at : at + 64])
                right += int((objectives.choice_scores(model, batch).argmax(1) == batch["answer"]).sum())
        return {"loss": total / EVALUATED, "accuracy": right / len(self.dev)}


def run(args: argparse.Namespace, cell: dict[str, Any]) -> dict[str, Any]:
    """One run; ``epsilon`` 0 is one without privacy."""
    torch.set_num_threads(1)
    data, model = Data(args), None
    rate = args.batch / args.examples
    private = cell["epsilon"] > 0
    steps = args.budget // (2 * args.batch) if cell["row"] in zotune.methods.names() else args.budget // (3 * args.batch)
    noise = accounting.noise_for(cell["epsilon"], rate, steps, DELTA, "add-or-remove") if private else 0.0
    train = zeroth_order if cell["row"] in zotune.methods.names() else first_order
    with torch.random.fork_rng():
        torch.manual_seed(cell["seed"])
        model, clip = train(args, data, cell, steps, noise)
    return {"cell": cell, "steps": steps, "noise": noise, "clip": clip, **data.results(model)}


def drawn(args: argparse.Namespace, random: torch.Generator) -> list[int]:
    chosen = torch.rand(args.examples, generator=random) < args.batch / args.examples
    return chosen.nonzero().flatten().tolist()


def schedule(step: int, steps: int) -> float:
    """Constant, and linear to 0 over the last 30 %."""
    return min(1.0, (steps - step) / (0.3 * steps))


def zeroth_order(args: argparse.Namespace, data: Data, cell: dict[str, Any], steps: int, noise: float) -> tuple[nn.Module, float]:
    model, method = data.model(), zotune.methods.get(cell["row"], eps=EPS)
    loss_fn, public = objectives.objective("lm", model), data.collate(data.public)
    probe = zotune.ZerothOrder(data.model(), method, lr=0.0, seed=cell["seed"] + 1000)
    with torch.no_grad():
        evaluate = evaluation(objectives.objective("lm", probe.model), [public])
        probe.updater.begin(0)
        plus, minus = (probe.forward.evaluate(evaluate, Offset(sign * EPS, probe.seed, 0, 0)) for sign in (1, -1))
    clip = float(((plus - minus).abs() / (2 * EPS)).quantile(0.75))
    settings: dict[str, Any] = {"examples": args.examples, "batch_size": args.batch, "public_batch": public, "delta": DELTA}
    privacy = zotune.Privacy(clip=clip, noise_multiplier=noise, **settings) if noise else None
    optimizer = zotune.ZerothOrder(model, method, lr=cell["lr"], seed=cell["seed"], privacy=privacy)
    random = torch.Generator().manual_seed(cell["seed"])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cell["lr"] * schedule(step, steps)
        rows = optimizer.sample() if privacy else drawn(args, random)
        optimizer.step(loss_fn, data.batch(rows) if rows else [])
    optimizer.remove_hooks()
    return model, clip


def first_order(args: argparse.Namespace, data: Data, cell: dict[str, Any], steps: int, noise: float) -> tuple[nn.Module, float]:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = data.model()
    if cell["row"].endswith("LoRA"):
        model = schemes.apply(model, "lora")
    else:
        linear = {id(module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in linear)
    model.train()
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="mean", strict=False)
    loss_fn, trained = objectives.objective("lm", model), [p for p in model.parameters() if p.requires_grad]
    loss_fn(data.collate(data.public)).mean().backward()
    lengths = torch.stack([p.grad_sample.flatten(1).square().sum(dim=1) for p in trained]).sum(dim=0).sqrt()
    clip = float(lengths.quantile(0.75))
    inner = torch.optim.AdamW(trained, lr=cell["lr"], weight_decay=0.0)
    optimizer: Any = inner
    if noise:
        generator = torch.Generator().manual_seed(cell["seed"])
        options: dict[str, Any] = {"noise_multiplier": noise, "max_grad_norm": clip, "expected_batch_size": args.batch}
        optimizer = DPOptimizer(inner, generator=generator, **options)
    random = torch.Generator().manual_seed(cell["seed"])
    for step in range(steps):
        for group in inner.param_groups:
            group["lr"] = cell["lr"] * schedule(step, steps)
        rows = drawn(args, random)
        optimizer.zero_grad()
        for parameter in trained:
            parameter.grad_sample = None
        loss_fn(data.batch(rows)).mean().backward()
        optimizer.step()
    wrapped.remove_hooks()
    return model.eval(), clip


class Runs:
    """Runs of a file of results; those that it lacks are run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        lines = args.results.read_text().splitlines() if args.results.exists() else []
        self._found = {json.dumps(r["cell"], sort_keys=True): r for r in map(json.loads, lines)}

    def of(self, row: str, epsilon: float, lr: float, seed: int) -> dict[str, Any]:
        args = self.args
        cell = {
            "row": row,
            "epsilon": epsilon,
            "lr": lr,
            "seed": seed,
            "budget": args.budget,
            "batch": args.batch,
            "examples": args.examples,
        }
        key = json.dumps(cell, sort_keys=True)
        if key not in self._found:
            self._found[key] = run(args, cell)
            with args.results.open("a") as file:
                file.write(json.dumps(self._found[key]) + "\n")
        return self._found[key]


def table_row(args: argparse.Namespace, row: str) -> tuple[str, list[str]]:
    runs, found = Runs(args), []
    most = max(args.epsilon)
    tried = {lr: runs.of(row, most, lr, 0)["loss"] for lr in ROWS[row]}
    best = min(tried, key=lambda lr: tried[lr] if math.isfinite(tried[lr]) else math.inf)
    for epsilon in [*args.epsilon, 0.0]:
        results = [runs.of(row, epsilon, best, seed) for seed in range(args.seeds)]
        numbers = [mean([r[key] for r in results]) for key in ("loss", "accuracy")]
        noise = f"{results[0]['noise']:.2f}" if epsilon else "none"
        found.append(f"| {row} | {epsilon or 'not private'} | {noise} | {results[0]['steps']} | {numbers[0]} | {numbers[1]} |")
    return f"| {row} | " + ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in tried.items()) + " |", found


def mean(numbers: list[float]) -> str:
    return f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else f"{numbers[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--epsilon", type=float, nargs="+", default=[2.0, 8.0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget", type=int, default=7680, help="sequences a run evaluates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes) as pool:
        made = list(pool.map(partial(table_row, args), args.rows))
    zero = Data(args)
    before = zero.results(zero.model())
    print(f"Before training: loss {before['loss']:.3f}, accuracy {before['accuracy']:.3f}.\n")
    print("| row | ε | noise | steps | loss of the private examples | held-out accuracy |\n|---|---|---|---|---|---|")
    print(*(line for _, lines in made for line in lines), sep="\n")
    print("\n| row | rate: loss |\n|---|---|")
    print(*(line for line, _ in made), sep="\n")


if __name__ == "__main__":
    main()
