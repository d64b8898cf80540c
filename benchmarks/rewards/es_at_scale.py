"""Evolution strategies as published for language models (arXiv 2509.24372), written plainly.

In each iteration N members θ + σε_n, ε_n ~ N(0, I) over all weights and regenerated from a seed, are scored one after the other by the mean
reward of greedy completions of the same prompts; the rewards become z-scores; θ ← θ + α (1/N) Σ z_n ε_n.
"""

from __future__ import annotations

import argparse

import record
import tasks
import torch

POPULATION = 30


@torch.no_grad()
def add_noise(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Add scale · ε to every weight, ε from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=scale)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--sigma", type=float, default=3e-3)
    record.for_each_seed(run, parser.parse_args())


def run(args: argparse.Namespace) -> None:
    model, tokenizer = record.load_model(args.model)
    task = tasks.load(args.task, args.model, args.data_dir, args.out)
    log = record.Record(args, task, "es-at-scale", tokenizer, sigma=args.sigma)
    log.evaluate(model)
    seeds = torch.Generator().manual_seed(args.seed)
    going, step = True, 0
    while going:
        rows = tasks.rows_of_step(task, args.seed, step, record.PROMPTS)
        members = torch.randint(2**31, (POPULATION,), generator=seeds).tolist()
        rewards, tokens = [], 0
        for member in members:
            add_noise(model, member, args.sigma)
            completions, made = record.generate(model, tokenizer, [row["prompt"] for row in rows], task.max_new_tokens)
            add_noise(model, member, -args.sigma)
            scores = task.reward(prompts=[row["prompt"] for row in rows], completions=completions, **tasks.columns(rows))
            rewards.append(sum(scores) / len(scores))
            tokens += made
        z = torch.tensor(rewards)
        z = (z - z.mean()) / (z.std(unbiased=False) + 1e-8)
        for member, score in zip(members, z.tolist(), strict=True):
            add_noise(model, member, args.learning_rate * score / POPULATION)
        going, step = log.step(model, tokens, sum(rewards) / POPULATION), step + 1


if __name__ == "__main__":
    main()
