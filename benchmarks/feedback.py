"""What output gradients teach by rule of the step, and what the gradient itself would teach in the same subspaces.

    python benchmarks/feedback.py --data_dir data --tasks sst2 trec

Only the output projections of all layers are trained, as in ``lozo-g``: in P S Vᵀ with P and V of 128 examples every 30 steps, or whole.
Rates are fixed, nothing is measured. Gradients by backprop stand for feedback without its error: those of the layers' outputs at the
scored positions alone (what a better feedback could tell), or all. A step is a forward pass of 16 examples, and what backprop needs for
the comparison is not counted but in the row that says so. One seed; a constant rate that falls over the last 30 %.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune
from zotune import bundled, objectives
from zotune.subspaces.guided_projection import fit_projection, polar
from zotune.tasks import prepare
from zotune.training.samplers import Stratified, classes_of

BATCH, OBSERVED, INTERVAL, Q, BETA = 16, 128, 30, 8, 0.9


class Rows(NamedTuple):
    """A layer's inputs (N, n) and the gradients of its output (N, d) at the scored positions, and inputs at a sample of all positions."""

    inputs: Tensor
    gradients: Tensor
    sampled: Tensor


class Run:
    """The bundled model, a task's examples, and gradients by one kind of feedback."""

    def __init__(self, task: str, data_dir: Path) -> None:
        folder = bundled.path("tiny-lm")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        settings: dict[str, Any] = {"task": task, "data_dir": str(data_dir), "objective": "lm", "num_train": 400, "num_dev": 100, "seed": 0}
        self.data = prepare(AutoTokenizer.from_pretrained(folder), self.model.config, **settings)
        self.loss_fn = objectives.objective("lm", self.model)
        self.layers: list[nn.Linear] = [w for block in self.model.model.layers for w in (block.self_attn.o_proj, block.mlp.down_proj)]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        return self.data.collate_train([self.data.train[row] for row in rows])  # type: ignore[index]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Whole batches of the examples in stratified order, epoch after epoch."""
        examples = Stratified(classes_of(self.data.train) or [0] * len(self.data.train or []), 0)
        for epoch in itertools.count():
            examples.set_epoch(epoch)
            order = list(examples)
            for at in range(0, len(order) - BATCH + 1, BATCH):
                yield self.batch(order[at : at + BATCH])

    def loss(self) -> float:
        """Of all training examples."""
        number = len(self.data.train or [])
        with torch.no_grad():
            return sum(float(self.loss_fn(self.batch(list(range(at, at + 50)))).sum()) for at in range(0, number, 50)) / number

    def rows(self, batch: dict[str, Tensor], feedback: str) -> list[Rows]:
        """``feedback``: "output", the gradient in the last hidden state for every layer, or "true", by backprop through what follows."""
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def leaf(module: nn.Module, args: Any, output: Any = None) -> Any:
            value = (args[0] if output is None else output).detach().requires_grad_() if feedback == "output" else output.requires_grad_()
            outputs[module] = value
            return (value,) if output is None else value

        handles = [layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0].detach()})) for layer in self.layers]
        if feedback == "output":
            handles.append(self.model.model.norm.register_forward_pre_hook(leaf))
        else:
            handles += [layer.register_forward_hook(leaf) for layer in self.layers]
        with torch.enable_grad():
            loss = self.loss_fn(batch).mean()
            found = torch.autograd.grad(loss, list(outputs.values()))
        for handle in handles:
            handle.remove()
        of_layers = list(found) * len(self.layers) if feedback == "output" else list(found)
        scored = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        scored.scatter_(1, batch["positions"], batch["targets"] != objectives.IGNORE)
        sampled = [inputs[layer][:, ::4].flatten(0, 1) for layer in self.layers]
        return [Rows(inputs[w][scored], g[scored], s) for w, g, s in zip(self.layers, of_layers, sampled, strict=True)]


def adam(beta2: float = 0.999, eps: float = 1e-12) -> Callable[[], Callable[[Tensor], Tensor]]:
    def made() -> Callable[[Tensor], Tensor]:
        kept: dict[str, Tensor] = {}
        taken = 0

        def step(gradient: Tensor) -> Tensor:
            nonlocal taken
            taken += 1
            for name, value, beta in (("m", gradient, BETA), ("v", gradient.square(), beta2)):
                kept[name] = torch.lerp(value, kept.get(name, torch.zeros_like(value)), beta)
            return (kept["m"] / (1 - BETA**taken)) / ((kept["v"] / (1 - beta2**taken)).sqrt() + eps)

        return step

    return made


def averaged(normalize: Callable[[Tensor], Tensor]) -> Callable[[], Callable[[Tensor], Tensor]]:
    def made() -> Callable[[Tensor], Tensor]:
        kept: list[Tensor] = []

        def step(gradient: Tensor) -> Tensor:
            kept[:] = [torch.lerp(gradient, kept[0] if kept else torch.zeros_like(gradient), BETA)]
            return normalize(kept[0])

        return step

    return made


#: Rule: what makes a step of a gradient, anew at each phase.
RULES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "Adam": adam(),
    "M / ‖M‖": averaged(lambda m: m * (len(m) ** 0.5 / m.norm().clamp_min(1e-30))),
    "polar(M)": averaged(polar),
}


def train(run: Run, rule: str, feedback: str, rate: float, sequences: int, whole: bool) -> float:
    """Loss of all training examples after so many sequences."""
    batches, draws, used, step = run.batches(), torch.Generator().manual_seed(0), 0, 0
    sides: list[tuple[Tensor, Tensor]] = []
    rules = [RULES[rule]() for _ in run.layers]
    while used < sequences:
        if step % INTERVAL == 0 and not whole:
            chosen = torch.randperm(len(run.data.train or []), generator=draws)[:OBSERVED].tolist()
            parts = [run.rows(run.batch(chosen[at : at + BATCH]), feedback) for at in range(0, OBSERVED, BATCH)]
            used, sides, rules = used + OBSERVED, [], [RULES[rule]() for _ in run.layers]
            for each in zip(*parts, strict=True):
                fitted = fit_projection(*(torch.cat([rows[side] for rows in each]) for side in range(3)), Q)
                assert fitted is not None
                sides.append(fitted)
        eta = rate * min(1.0, max(0.0, 1 - used / sequences) / 0.3)
        for place, (layer, rows) in enumerate(zip(run.layers, run.rows(next(batches), feedback), strict=True)):
            if whole:
                layer.weight.data.add_(rules[place](rows.gradients.T @ rows.inputs), alpha=-eta)
            else:
                p, v = sides[place]
                layer.weight.data.add_(p @ rules[place]((rows.gradients @ p).T @ (rows.inputs @ v)) @ v.T, alpha=-eta)
        used, step = used + BATCH, step + 1
    return run.loss()


def backprop(run: Run, rate: float, sequences: int) -> float:
    """The same for AdamW by backprop on all of these matrices; a backward pass counts as two forwards."""
    for layer in run.layers:
        layer.weight.requires_grad_(True)
    optimizer = zotune.baselines.FirstOrder(run.model, "fo-adamw", lr=rate)
    batches = run.batches()
    while optimizer.sequences_evaluated < sequences:
        left = 1 - optimizer.sequences_evaluated / sequences
        optimizer.param_groups[0]["lr"] = rate * min(1.0, left / 0.3)
        optimizer.step(run.loss_fn, next(batches))
    return run.loss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--sequences", type=int, default=2400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, Callable[[Run, float], float], tuple[float, ...]]] = []
    for rule in RULES:
        for feedback in ("output", "true"):
            rates = (0.03, 0.1) if rule == "Adam" else (0.1, 0.2)
            one = partial(train, rule=rule, feedback=feedback, sequences=args.sequences, whole=False)
            rows.append((f"{rule}, {feedback}", lambda run, rate, one=one: one(run, rate=rate), rates))  # type: ignore[misc]
    for feedback in ("output", "true"):
        one = partial(train, rule="Adam", feedback=feedback, sequences=args.sequences, whole=True)
        rows.append((f"whole matrices, Adam, {feedback}", lambda run, rate, one=one: one(run, rate=rate), (3e-4, 1e-3)))  # type: ignore[misc]
    rows.append(("backprop, AdamW", lambda run, rate: backprop(run, rate, args.sequences), (3e-4, 1e-3)))
    print(f"| step, gradient | rates | {' | '.join(args.tasks)} |\n|---|---|" + "---|" * len(args.tasks))
    for name, one_run, rates in rows:
        found = [min((one_run(Run(task, args.data_dir), rate), rate) for rate in rates) for task in args.tasks]
        cells = " | ".join(f"{loss:.3f} ({rate:g})" for loss, rate in found)
        print(f"| {name} | {', '.join(f'{rate:g}' for rate in rates)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
