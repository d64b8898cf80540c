"""EGGROLL's form of evolution strategies (arXiv 2511.16652): a low-rank perturbation of its own for every row of a batch.

Row i generates with W + σE_i, E_i = A_i B_iᵀ / √r, A_i and B_i standard normal, in antithetic pairs; rows of one prompt are a group.
Fitness: reward minus its group's mean, over the standard deviation of all; W ← W + α (1/N) Σ f_i E_i. Trained are the blocks' matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import record
import tasks
import torch
from torch import Tensor, nn


class Noise:
    """Factors of every row and matrix of a step.

    Args:
        matrices: the linear layers. rows: an even number, in pairs of opposite sign.
    """

    def __init__(self, matrices: list[nn.Linear], rank: int, sigma: float) -> None:
        self.matrices, self.rank, self.sigma = matrices, rank, sigma
        self.factors: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        for matrix in matrices:
            matrix.register_forward_hook(self._hook(matrix))

    def draw(self, rows: int, generator: torch.Generator) -> None:
        sign = torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None, None]
        for matrix in self.matrices:
            a = torch.randn(rows // 2, matrix.out_features, self.rank, generator=generator).repeat_interleave(2, 0) * sign
            b = torch.randn(rows // 2, matrix.in_features, self.rank, generator=generator).repeat_interleave(2, 0)
            self.factors[matrix] = a / self.rank**0.5, b

    def _hook(self, matrix: nn.Linear) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            if matrix not in self.factors:
                return None
            a, b = self.factors[matrix]
            return torch.baddbmm(output, inputs[0] @ b, a.transpose(1, 2), alpha=self.sigma)

        return add

    @torch.no_grad()
    def update(self, fitness: Tensor, rate: float) -> None:
        for matrix, (a, b) in self.factors.items():
            matrix.weight.add_(torch.einsum("nir,njr->ij", a * fitness[:, None, None], b), alpha=rate / len(fitness))
        self.factors.clear()


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--sigma", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=1)
    record.for_each_seed(run, parser.parse_args())


def run(args: argparse.Namespace) -> None:
    model, tokenizer = record.load_model(args.model)
    task = tasks.load(args.task, args.model, args.data_dir, args.out)
    matrices = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    noise, generator = Noise(matrices, args.rank, args.sigma), torch.Generator().manual_seed(args.seed)
    log = record.Record(args, task, "eggroll", tokenizer, sigma=args.sigma, rank=args.rank)
    log.evaluate(model)
    going, step, members = True, 0, record.ROWS // record.PROMPTS
    while going:
        rows = [row for row in tasks.rows_of_step(task, args.seed, step, record.PROMPTS) for _ in range(members)]
        prompts = [row["prompt"] for row in rows]
        noise.draw(len(rows), generator)
        completions, tokens = record.generate(model, tokenizer, prompts, task.max_new_tokens)
        rewards = torch.tensor(task.reward(prompts=prompts, completions=completions, **tasks.columns(rows)))
        grouped = rewards.view(-1, members)
        fitness = (grouped - grouped.mean(1, keepdim=True)).flatten() / (rewards.var(unbiased=False) + 1e-5).sqrt()
        noise.update(fitness, args.learning_rate)
        going, step = log.step(model, tokens, float(rewards.mean())), step + 1


if __name__ == "__main__":
    main()
