"""Shares of examples against what they are shares of: flipped labels, and retraining on subsets, on SST-2 with the bundled model.

    python benchmarks/influence.py --data_dir data --out benchmarks/results/influence.jsonl

Flipped labels: part of the training labels is wrong. A ranking is worth its area under the curve (AUC): how often a flipped example
stands above a correct one; 0.5 is chance. Rankings: shares; TracIn by backprop at checkpoints of the same run (2002.08484); the loss of the
example before training and after it.

Retraining: models are trained on random halves of the examples by SGD with backprop, from the same weights; the linear datamodeling score
is the rank correlation of their validation losses with the sum of the scores of their halves (2303.14186). SGD is the mean of the
zeroth-order path, so that it has no noise of directions. 0 is chance.
"""

from __future__ import annotations

import argparse
import json
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
from zotune.attribution.shares import shares_of
from zotune.optim.attribution import Attributed, Attribution, attributed
from zotune.optim.journal import Journal
from zotune.tasks import prepare

#: Options of `lozo` and of `mezo` that are compared; the first is the one whose shares are compared with retraining.
SETTINGS: dict[str, tuple[str, dict[str, Any], float]] = {
    "lozo, interval 1": ("lozo", {"rank": 1, "interval": 1}, 4e-4),
    "lozo, interval 50": ("lozo", {"rank": 1, "interval": 50}, 4e-4),
}


def auc(scores: Tensor, positive: Tensor) -> float:
    """How often a positive example has a higher score than another one."""
    difference = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def spearman(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([each.argsort().argsort().double() for each in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


class Study:
    """Training examples with flipped labels, validation examples, and a fresh model for each run."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        path = str(bundled.path("tiny-lm"))
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.path = path
        model = self.model()
        data = prepare(
            self.tokenizer,
            model.config,
            task="sst2",
            data_dir=args.data_dir,
            objective="choices",
            num_train=4000,
            seed=seed,
            parts=("train",),
        )
        assert data.train is not None
        short = [row for row in data.train if 6 <= len(row["prompt_ids"]) <= args.longest]
        self.collate = data.collate_train
        n, random = args.examples, np.random.default_rng(seed)
        self.validation = self.collate(sorted(short[n : n + args.validation], key=lambda row: len(row["prompt_ids"])))
        self.flipped = torch.zeros(n, dtype=torch.bool)
        self.flipped[torch.from_numpy(random.permutation(n)[: round(args.flipped * n)])] = True
        self.train = [
            {**row, "answer": 1 - row["answer"]} if bad else row for row, bad in zip(short[:n], self.flipped.tolist(), strict=True)
        ]
        self.order = [row for _ in range(1 + args.steps * args.batch // n) for row in random.permutation(n).tolist()]

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def losses(self, model: Any, rows: list[int]) -> Tensor:
        with torch.no_grad():
            return objectives.objective("choices", model)(self.collate([self.train[row] for row in rows])).detach()

    def shares(self, name: str, lr: float, options: dict[str, Any]) -> dict[str, Any]:
        """A zeroth-order run with shares; TracIn along it."""
        args, model = self.args, self.model()
        loss_fn = objectives.objective("choices", model)
        before = self.losses(model, list(range(args.examples)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal.zo"
            method = zotune.methods.get(name, num_directions=args.directions, eps=3e-3, **options)
            optimizer = zotune.ZerothOrder(model, method, lr=lr, seed=self.seed, journal=path)
            attribution = Attribution(optimizer.run, loss_fn, [self.validation], 1)
            optimizer.step_estimate.attribute(attribution)
            tracin, spent, begin = torch.zeros(args.examples, dtype=torch.float64), 0.0, time.perf_counter()
            for step in range(args.steps):
                if step % args.checkpoint_steps == 0 and args.tracin:
                    start = time.perf_counter()
                    tracin += self.tracin(optimizer, model)
                    spent += time.perf_counter() - start
                rows = self.order[step * args.batch : (step + 1) * args.batch]
                attribution.rows = torch.tensor(rows)
                optimizer.step(loss_fn, self.collate([self.train[row] for row in rows]))
            attribution.finish()
            seconds = time.perf_counter() - begin - spent
            journal = Journal.open(path)
            found, measured = (
                shares_of(journal, args.examples),
                [each for each, record in attributed(journal.records()) if record is not None],
            )
        after = self.losses(model, list(range(args.examples)))
        optimizer.remove_hooks()
        return {
            "shares": found.sums, "errors": found.errors, "tracin": tracin, "before": before, "after": after, "measured": measured,
            "first": found.first, "second": found.second, "change": found.measured, "seconds": seconds,
        }  # fmt: skip

    def tracin(self, optimizer: Any, model: Any) -> Tensor:
        """−⟨∇ℓ_i, ∇L_v⟩ of every example by backprop, at the trained weights of now."""
        copy = self.model()
        copy.load_state_dict(model.state_dict())
        loss_fn, parameters = objectives.objective("choices", copy), [p for p in copy.parameters() if p.requires_grad]
        target = torch.autograd.grad(loss_fn(self.validation).mean(), parameters)
        found = []
        for row in self.train:
            gradient = torch.autograd.grad(loss_fn(self.collate([row])).sum(), parameters)
            found.append(-sum(float((a * b).sum()) for a, b in zip(gradient, target, strict=True)))
        return torch.tensor(found, dtype=torch.float64)

    def retrained(self, rows: list[int]) -> float:
        """Validation loss after SGD by backprop on some of the examples."""
        args, model = self.args, self.model()
        loss_fn, parameters = objectives.objective("choices", model), [p for p in model.parameters() if p.requires_grad]
        batch = self.collate([self.train[row] for row in rows])
        for _ in range(args.retrain_steps):
            gradients = torch.autograd.grad(loss_fn(batch).mean(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=args.retrain_lr)
        with torch.no_grad():
            return float(loss_fn(self.validation).mean())


def thinned(measured: list[Attributed], examples: int, directions: int, every: int) -> Tensor:
    """Shares from the first ``directions`` of every ``every``-th step alone."""
    sums = torch.zeros(examples, dtype=torch.float64)
    for one in measured[::every]:
        weights = -one.slopes[:directions].double()
        sums.index_add_(0, one.rows.long(), (weights.unsqueeze(1) * one.contributions[:directions].double()).sum(dim=0))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", type=Path, required=True, help="results, a line each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    for name, value in (("examples", 96), ("validation", 32), ("longest", 18), ("steps", 60), ("batch", 16), ("directions", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--flipped", type=float, default=0.2)
    parser.add_argument("--tracin", type=int, default=1)
    parser.add_argument("--checkpoint_steps", type=int, default=30)
    parser.add_argument("--subsets", type=int, default=30, help="retrainings of the first seed")
    parser.add_argument("--retrain_steps", type=int, default=10)
    parser.add_argument("--retrain_lr", type=float, default=0.002)
    args = parser.parse_args()
    for seed in args.seeds:
        study = Study(args, seed)
        for setting in args.settings:
            method, options, lr = SETTINGS[setting]
            found = study.shares(method, lr, options)
            scores = {"shares": found["shares"], "tracin": found["tracin"], "loss before": found["before"], "loss after": found["after"]}
            line: dict[str, Any] = {"setting": setting, "seed": seed, "args": {**vars(args), "out": str(args.out)}}
            line |= {name: found[name] for name in ("first", "second", "change", "seconds")}
            line["auc"] = {name: auc(score, study.flipped) for name, score in scores.items()}
            line["correlation with tracin"] = spearman(found["shares"], found["tracin"])
            pairs = [(1, 1), (2, 1), (args.directions, 1), (args.directions, 5), (1, 10)]
            line["thinned"] = [(k, s, auc(thinned(found["measured"], args.examples, k, s), study.flipped)) for k, s in pairs]
            if seed == args.seeds[0] and setting == args.settings[0] and args.subsets:
                random = np.random.default_rng(100 + seed)
                halves = [random.permutation(args.examples)[: args.examples // 2].tolist() for _ in range(args.subsets)]
                measured = torch.tensor([study.retrained(half) for half in halves], dtype=torch.float64)
                line["losses of subsets"] = measured.tolist()
                sums = {name: torch.stack([score[half].sum().double() for half in halves]) for name, score in scores.items()}
                sums["labels"] = torch.stack([study.flipped[half].double().sum() for half in halves])
                line["datamodeling score"] = {name: spearman(each, measured) for name, each in sums.items()}
            print(json.dumps({k: v for k, v in line.items() if k != "args"}), flush=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
