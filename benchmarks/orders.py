"""Other orders of a run's examples, told and retrained, on SST-2 with the bundled model.

    python benchmarks/orders.py --data_dir data --out benchmarks/results/orders.jsonl

Random orders of the same examples are told from one run (`zotune orders`: first-order coefficients along the run's own directions, the
journal replayed with them, a true loss), and each is retrained. Compared are the losses of all training examples at the end, by rank
correlation over the orders: of the replay; of the first-order estimate alone, that is L(θ_T) − Σ_t η_t/K Σ_k (c'_tk − c_tk) s_tk, without a
replay; 0 is chance. *Error of c* is ‖c' − c‖ / ‖c‖ against the retrained run's own coefficients, over all of its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune
from zotune import bundled, objectives
from zotune.attribution import orders
from zotune.optim.journal import Journal
from zotune.optim.replay import before_steps
from zotune.optim.slopes import SlopeMeter
from zotune.tasks import prepare

#: Method, its options, and learning rates: one of small steps, and one at which the loss falls fast.
SETTINGS: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("lozo", {"rank": 2, "interval": 50}, (1e-4, 3e-4)),
    ("mezo", {}, (3e-5, 1e-4)),
]


class Study:
    """Examples, orders, and a fresh model for each run."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed, self.path = args, seed, str(bundled.path("tiny-lm"))
        config = self.model().config
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        task: dict[str, Any] = {"task": "sst2", "data_dir": args.data_dir, "objective": "lm", "num_train": 4000, "seed": seed}
        data = prepare(tokenizer, config, parts=("train",), **task)
        assert data.train is not None
        self.train = [row for row in data.train if 6 <= len(row["prompt_ids"]) <= args.longest][: args.examples]
        self.collate = data.collate_train

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def batch(self, rows: list[int]) -> Any:
        return self.collate([self.train[row] for row in rows])

    def order(self, number: int) -> list[list[int]]:
        args, random = self.args, np.random.default_rng((self.seed, number))
        passes = 1 + args.steps * args.batch // args.examples
        rows = [row for _ in range(passes) for row in random.permutation(args.examples).tolist()]
        return [rows[at : at + args.batch] for at in range(0, args.steps * args.batch, args.batch)]

    def losses(self, model: Any) -> float:
        with torch.no_grad():
            return float(objectives.objective("lm", model)(self.batch(list(range(self.args.examples)))).mean())

    def trained(self, method: Any, lr: float, number: int, journal: Path | None = None) -> tuple[float, Tensor]:
        """Loss at the end and coefficients, (T, K)."""
        model = self.model()
        loss_fn, found = objectives.objective("lm", model), []
        optimizer = zotune.ZerothOrder(model, method, lr=lr, seed=self.seed, journal=journal)
        for rows in self.order(number):
            optimizer.step(loss_fn, self.batch(rows))
            assert optimizer.last_report is not None
            found.append(torch.tensor(optimizer.last_report.coefficients, dtype=torch.float64))
        optimizer.remove_hooks()
        return self.losses(model), torch.stack(found)

    def compare(self, name: str, options: dict[str, Any], lr: float) -> dict[str, Any]:
        args, method = self.args, zotune.methods.get(name, eps=3e-3, **options)
        count = args.examples
        whole = [self.batch(list(range(at, min(at + 64, count)))) for at in range(0, count, 64)]
        with tempfile.TemporaryDirectory() as folder:
            before = self.losses(self.model())
            end, own = self.trained(method, lr, 0, Path(folder) / "j.zo")
            journal, model = Journal.open(Path(folder) / "j.zo"), self.model()
            begin = time.process_time()
            optimizer = before_steps(model, journal)
            meter = SlopeMeter(optimizer, objectives.objective("lm", model), whole, count)
            run = orders.measure(optimizer, journal, meter, self.order(0))
            measuring = time.process_time() - begin
            optimizer.remove_hooks()
            rates = torch.tensor([max(record.lrs) for record in run.steps], dtype=torch.float64)
            told, first, true, errors, spent = [], [], [], [], 0.0
            for number in range(1, 1 + args.orders):
                order, model = self.order(number), self.model()
                begin = time.process_time()
                optimizer = before_steps(model, journal, known=True)
                for record in run.reordered(order):
                    optimizer.apply(record)
                optimizer.remove_hooks()
                told.append(self.losses(model))
                spent += time.process_time() - begin
                c = run.coefficients(order)
                change = (rates.unsqueeze(1) / c.shape[1] * (c - own) * run.slopes.mean(dim=2)).sum()
                first.append(end - float(change))
                loss, coefficients = self.trained(method, lr, number)
                true.append(loss)
                errors.append(float((c - coefficients).norm() / coefficients.norm()))
        return {
            "method": name, "lr": lr, "seed": self.seed, "steps": args.steps, "examples": count, "batch": args.batch, "before": before,
            "end": end, "told": told, "first_order": first, "retrained": true, "mismatch": run.mismatch, "error": statistics.fmean(errors),
            "replay": spearman(told, true), "estimate": spearman(first, true), "measuring_seconds": measuring, "telling_seconds": spent,
        }  # fmt: skip


def spearman(left: list[float], right: list[float]) -> float:
    ranks = np.stack([np.argsort(np.argsort(each)) for each in (left, right)])
    return float(np.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--longest", type=int, default=20, help="tokens of a prompt")
    args = parser.parse_args()
    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(r["method"], r["lr"], r["seed"]) for r in found}
    for seed in range(args.seeds):
        for name, options, rates in SETTINGS:
            for lr in rates:
                if (name, lr, seed) not in known:
                    found.append(Study(args, seed).compare(name, options, lr))
                    with args.out.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
    print("| method | rate | loss before, after | spread of the orders | error of c | rank correlation: replay | first order alone |")
    print("|---|---|---|---|---|---|---|")
    for name, _, rates in SETTINGS:
        for lr in rates:
            rows = [r for r in found if (r["method"], r["lr"]) == (name, lr)]
            spread = statistics.fmean(statistics.stdev(r["retrained"]) for r in rows)
            cells = [f"{statistics.fmean(r[key] for r in rows):.2f}" for key in ("before", "end")]
            both = [mean([r[key] for r in rows]) for key in ("replay", "estimate")]
            error = statistics.fmean(r["error"] for r in rows)
            print(f"| `{name}` | {lr:g} | {', '.join(cells)} | {spread:.3f} | {error:.0%} | {' | '.join(both)} |")
    sequences = 2 * args.steps * args.examples
    one = 2 * args.steps * args.batch
    print(f"\nMeasuring: {sequences} sequences, as many as {sequences / one:.3g} runs of {one}; an order more: {args.examples}.")


def mean(numbers: list[float]) -> str:
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{spread}"


if __name__ == "__main__":
    main()
