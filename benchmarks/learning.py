"""Learning curves of methods on a task: tune every method on the same grid, then run the best cell over seeds.

    python benchmarks/learning.py --model M --task sst2 --data_dir D --methods mezo lozo \\
        --lr 1e-4 2e-4 4e-4 --eps 1e-3 1e-2 --out runs/learning

A cell (method, learning rate, eps) is chosen by its training loss over the last tenth of its steps; its accuracy on a part of
the *training* split that is held out is shown beside it. The validation split is looked at only by the best cell's runs, one
per seed. Results are appended to ``results.jsonl`` as they come; a run that is
there is not repeated, so a killed sweep continues. At the end: ``curves.png`` and a Markdown table with the grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from zotune.io.figures import new_figure, save_figure

HELD_OUT = "held out"
#: Steps to a point of a loss curve.
BLOCK = 10


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """One training run; ``cell`` names everything it depends on."""
    import backprop
    import torch
    from label_similarity import Batches, LabelSimilarity
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    import zotune
    from zotune.training.samplers import Stratified, classes_of
    from zotune.training.trainer import DECAY

    torch.set_num_threads(cell["threads"])
    similarity, scheme = cell["objective"] == "similarity", cell.get("scheme", "full")
    tokenizer = AutoTokenizer.from_pretrained(cell["model"])
    config = AutoConfig.from_pretrained(cell["model"])
    data = zotune.tasks.prepare(
        tokenizer,
        config,
        task=cell["task"],
        data_dir=cell["data_dir"],
        template=cell["template"],
        objective="classifier" if similarity else cell["objective"],
        num_train=None if cell.get("max_tokens") else cell["num_train"],
        num_dev=cell["num_dev"],
        num_eval=cell.get("num_eval"),
        seed=0,
    )
    if cell.get("max_tokens"):
        chosen = short(data.train, cell["max_tokens"])
        if cell.get("drawn"):  # a file may be in the order of its classes
            chosen = random.Random(0).sample(chosen, len(chosen))
        data = dataclasses.replace(data, train=chosen[: cell["num_train"]], dev=short(data.dev, cell["max_tokens"]))
    model: Any
    optimizer: Any
    if similarity:
        encoder = AutoModel.from_pretrained(cell["model"], dtype=torch.float32, add_pooling_layer=False)
        model = LabelSimilarity(zotune.training.schemes.apply(encoder, scheme))
        named = Batches(tokenizer, cell["task"])
    else:
        kind = AutoModelForMaskedLM if cell["objective"] == "mlm" else AutoModelForCausalLM
        model = zotune.training.schemes.apply(kind.from_pretrained(cell["model"], dtype=torch.float32), scheme)
    held_out = data.dev if cell["score"] == HELD_OUT else data.eval
    train = data.train
    assert train is not None and held_out is not None

    def accuracy() -> float:
        model.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(held_out), 64):
                batch = data.collate_eval(held_out[start : start + 64])
                if similarity:
                    scores, answers = model(named(batch)), batch["labels"]
                elif data.masked:
                    scores, answers = zotune.objectives.label_word_logits(model, batch), batch["answer"]
                else:
                    scores, answers = zotune.objectives.choice_scores(model, batch), batch["answer"]
                right += int((scores.argmax(1) == answers).sum())
        return right / len(held_out)

    def similarity_loss(batch: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(named(batch)), batch["labels"], reduction="none")

    loss_fn = similarity_loss if similarity else zotune.objectives.objective(data.train_objective, model)

    def examples(step: int, count: int) -> list[dict[str, Any]]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1_000_003 * cell["seed"] + step))[:count].tolist()
        return [data.collate_train([train[i] for i in order[at : at + 16]]) for at in range(0, len(order), 16)]

    if cell["method"] in backprop.BACKWARD:
        optimizer = backprop.optimizer(model, cell["method"], cell["lr"], cell["seed"])
    else:
        method = zotune.methods.get(cell["method"], eps=cell["eps"], **cell["options"])
        optimizer = zotune.ZerothOrder(model, method, lr=cell["lr"], seed=cell["seed"], sample_batches=examples)
    steps, budget = cell["steps"], cell.get("budget")

    def left(step: int) -> float:
        """The part of the run that is still to come."""
        return max(0.0, 1 - (optimizer.sequences_evaluated / budget if budget else step / steps))

    def whole_loss() -> float:
        """Mean loss of all training examples at the weights as they are."""
        with torch.no_grad():
            parts = [loss_fn(data.collate_train(train[start : start + 50])).double().sum() for start in range(0, len(train), 50)]
        return float(torch.stack(parts).sum()) / len(train)

    falling = {"constant": 0.0, "linear": 1.0, "warmup_stable_decay": DECAY}[cell["schedule"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, left(t) / falling) if falling else 1.0)
    shuffle = torch.Generator().manual_seed(cell["seed"])
    stratified = Stratified(classes_of(train) or [0] * len(train), cell["seed"])
    order: list[int] = []
    losses, sequences = [], []
    curve = [] if cell.get("end_only") else [(0, accuracy())]
    whole = [] if cell.get("end_only") else [(0, whole_loss())]
    begun = time.perf_counter()
    step, stepping, looks = -1, 0.0, 0
    while left(step + 1) > 0:
        step += 1
        if len(order) < cell["batch_size"]:
            stratified.set_epoch(step)
            order = list(stratified) if cell.get("stratified") else torch.randperm(len(train), generator=shuffle).tolist()
        chosen, order = order[: cell["batch_size"]], order[cell["batch_size"] :]
        try:
            losses.append(float(optimizer.step(loss_fn, data.collate_train([train[i] for i in chosen]))))
        except zotune.NonFiniteLossError:
            whole.append((optimizer.sequences_evaluated, float("nan")))
            curve.append((step, float("nan")))
            break
        sequences.append(optimizer.sequences_evaluated)
        stepping = time.perf_counter() - begun
        schedule.step()
        if cell.get("eval_every"):
            due = optimizer.sequences_evaluated // cell["eval_every"] > looks
            looks = optimizer.sequences_evaluated // cell["eval_every"]
        else:
            due = (step + 1) % cell["eval_steps"] == 0
        if due or not left(step + 1):
            curve.append((step + 1, accuracy()))
            whole.append((optimizer.sequences_evaluated, whole_loss()))
    window = max(1, len(losses) // 10)
    return {
        "cell": cell,
        "accuracy": curve[-1][1],
        "zero_shot": curve[0][1],
        "train_loss": statistics.fmean(losses[-window:]) if losses else float("nan"),
        "curve": curve,
        "whole": whole,
        "losses": [statistics.fmean(losses[i : i + BLOCK]) for i in range(0, len(losses), BLOCK)],
        "sequences": [sequences[min(i + BLOCK, len(sequences)) - 1] for i in range(0, len(losses), BLOCK)],
        "forward_passes": optimizer.forward_passes,
        "seconds": time.perf_counter() - begun,
        "step_seconds": stepping / max(1, len(losses)),
    }


def short(examples: Any, most: int) -> list[dict[str, Any]]:
    """The examples whose prompt has at most ``most`` tokens."""
    return [e for e in examples or [] if len(e["prompt_ids"]) <= most]


def sweep(cells: list[dict[str, Any]], results: Path, processes: int) -> list[dict[str, Any]]:
    """Run the cells that are not on file yet; the results of all of them."""
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {json.dumps(r["cell"], sort_keys=True) for r in done}
    due = [cell for cell in cells if json.dumps(cell, sort_keys=True) not in known]
    with ProcessPoolExecutor(processes) as pool:
        for result in pool.map(run, due):
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            done.append(result)
            cell = result["cell"]
            print(
                f"{cell['method']:<14} lr {cell['lr']:<8} eps {cell['eps']:<6} seed {cell['seed']} {cell['score']:<10} "
                f"accuracy {result['zero_shot']:.3f} -> {result['accuracy']:.3f}  loss {result['train_loss']:.4f}  "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
    wanted = {json.dumps(cell, sort_keys=True) for cell in cells}
    return [r for r in done if json.dumps(r["cell"], sort_keys=True) in wanted]


def smoothed(losses: list[float], window: int = 10) -> list[float]:
    """Means of each point and up to ``window - 1`` before it."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def sequences_to(target: float, runs: list[dict[str, Any]]) -> float | None:
    """Mean over the runs of the sequences evaluated until the loss is at most ``target``; None if a run never is.

    The loss of all training examples, where runs have looked at it, else the smoothed loss of their batches.
    """
    needed = []
    for r in runs:
        points = r.get("whole") or zip(r["sequences"], smoothed(r["losses"]), strict=True)
        reached = [n for n, loss in points if loss <= target]
        if not reached:
            return None
        needed.append(reached[0])
    return statistics.fmean(needed)


def ratios(finals: dict[str, list[dict[str, Any]]], reference: str) -> list[str]:
    """Lines of a table: sequences each method needs to a loss of the reference's, over what the reference needs."""
    runs = finals[reference]
    first = statistics.fmean(smoothed(r["losses"])[0] for r in runs)
    last = statistics.fmean(r["train_loss"] for r in runs)
    total = statistics.fmean(r["sequences"][-1] for r in runs)
    others = [m for m in finals if m != reference]
    lines = ["", f"| loss | {reference} | {' | '.join(others)} |", "|---|---|" + "---|" * len(others)]
    for share in (0.5, 0.8, 0.9, 1.0):
        target = first + share * (last - first)
        base = total if share == 1.0 else sequences_to(target, runs)  # its end is where it is all used up
        row = [f"{target:.3f}", "never" if base is None else f"{base:.0f}"]
        for other in others:
            n = sequences_to(target, finals[other])
            row.append("never" if n is None else f"{n:.0f}" if base is None else f"{n:.0f} ({base / n:.1f}× fewer)")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def looked_at(result: dict[str, Any]) -> list[float]:
    """Sequences evaluated at the points of a run's curve of accuracies."""
    if len(result.get("whole", ())) == len(result["curve"]):
        return [n for n, _ in result["whole"]]
    per_step = result["sequences"][-1] / result["curve"][-1][0]
    return [step * per_step for step, _ in result["curve"]]


def plot(finals: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    figure, ((left, right),) = new_figure(1, 2, (10, 3.8))
    for method, runs in finals.items():
        smooth = [smoothed(r["losses"], max(1, len(r["losses"]) // 30)) for r in runs]
        loss = list(zip(*smooth, strict=False))
        x = runs[0]["sequences"][: len(loss)]
        (line,) = left.plot(x, [statistics.fmean(v) for v in loss], label=method)
        left.fill_between(x, [min(v) for v in loss], [max(v) for v in loss], alpha=0.2, color=line.get_color())
        x = looked_at(runs[0])
        values = [[r["curve"][i][1] for r in runs] for i in range(len(x))]
        right.plot(x, [statistics.fmean(v) for v in values], color=line.get_color(), label=method)
        right.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    lengths = [runs[0]["sequences"][-1] for runs in finals.values()]
    if max(lengths) > 4 * min(lengths):
        for axes in (left, right):
            axes.set_xscale("log")
    left.set(xlabel="sequences evaluated", ylabel="training loss", title=title)
    right.set(xlabel="sequences evaluated", ylabel="validation accuracy", title="mean and range over seeds")
    right.legend(frameon=False)
    save_figure(figure, path)


def number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--template")
    parser.add_argument("--objective", choices=["lm", "choices", "similarity"], default="choices", help="similarity: for encoders")
    parser.add_argument("--scheme", default="full", help="what is trained: full, lora, prefix, prompt, head, bias")
    parser.add_argument("--methods", nargs="+", default=["mezo", "lozo"])
    parser.add_argument("--lr", nargs="+", type=number_or_auto, default=["auto"])
    parser.add_argument(
        "--auto", nargs="*", default=[], help="methods that measure learning rate and eps: no grid, the trainer's default schedule"
    )
    parser.add_argument("--eps", nargs="+", type=number_or_auto, default=[1e-3])
    parser.add_argument("--options", type=json.loads, default={}, help='options per method, JSON: {"lozo": {"rank": 1}}')
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--final_steps", type=int, help="steps of the best cell's runs (default: --steps)")
    parser.add_argument(
        "--budget", type=json.loads, default={}, help='sequences of a run, in place of steps, and eval_steps: {"lozo-e": [9600, 10]}'
    )
    parser.add_argument("--stratified", nargs="*", default=[], help="methods that take the examples in stratified order")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--eval_steps", type=int, default=200)
    parser.add_argument("--num_train", type=int, default=1000)
    parser.add_argument("--num_dev", type=int, default=500)
    parser.add_argument("--schedule", choices=["constant", "linear", "warmup_stable_decay"], default="constant")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads a process")
    parser.add_argument("--grid_only", action="store_true", help="stop after the grid")
    parser.add_argument("--reference", default="mezo", help="the method that the others' sequences are compared with")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    shared = {
        name: getattr(args, name)
        for name in (
            [
                "model",
                "task",
                "data_dir",
                "template",
                "objective",
                "steps",
                "batch_size",
                "eval_steps",
                "num_train",
                "num_dev",
                "schedule",
                "threads",
            ]
        )
    }

    def cell(method: str, lr: float, eps: float, seed: int, score: str) -> dict[str, Any]:
        options = args.options.get(method, {})
        steps = args.final_steps if args.final_steps and score != HELD_OUT else args.steps
        eval_steps = args.steps if score == HELD_OUT else args.eval_steps  # the grid looks at the end only
        # what was not asked for is left out, so that results of before it could be asked for still count
        budget, looks = args.budget.get(method, (None, 0))
        asked = {"stratified": method in args.stratified, "budget": budget, "schedule": method in args.auto and "warmup_stable_decay"}
        asked["scheme"] = args.scheme != "full" and args.scheme
        return {
            **shared,
            **{name: value for name, value in asked.items() if value},
            "steps": steps,
            "eval_steps": looks or eval_steps,
            "method": method,
            "lr": lr,
            "eps": eps,
            "options": options,
            "seed": seed,
            "score": score,
        }

    results = args.out / "results.jsonl"
    tuned = [m for m in args.methods if m not in args.auto]
    grid = [cell(m, lr, eps, 0, HELD_OUT) for m, eps, lr in itertools.product(tuned, args.eps, args.lr)]
    scored = sweep(grid, results, args.processes)
    lines = ["| method | η | ε | held-out accuracy | training loss |", "|---|---|---|---|---|"]
    best: dict[str, dict[str, Any]] = {}
    for result in sorted(scored, key=lambda r: (r["cell"]["method"], r["cell"]["eps"], r["cell"]["lr"])):
        c = result["cell"]
        lines.append(f"| {c['method']} | {c['lr']} | {c['eps']} | {result['accuracy']:.3f} | {result['train_loss']:.4f} |")
        if c["method"] not in best or result["train_loss"] < best[c["method"]]["train_loss"]:
            best[c["method"]] = result
    if not args.grid_only:
        chosen = {m: (best[m]["cell"]["lr"], best[m]["cell"]["eps"]) if m in best else ("auto", "auto") for m in args.methods}
        finals_cells = [cell(m, *chosen[m], s, "validation") for m in args.methods for s in args.seeds]
        finals_list = sweep(finals_cells, results, args.processes)
        finals = {m: [r for r in finals_list if r["cell"]["method"] == m] for m in args.methods}
        lines += [
            "",
            "| method | η | ε | zero-shot | after | training loss | forward passes | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, runs in finals.items():
            c, accuracy, loss = runs[0]["cell"], [r["accuracy"] for r in runs], [r["train_loss"] for r in runs]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (accuracy, loss)]
            lines.append(
                f"| {method} | {c['lr']} | {c['eps']} | {runs[0]['zero_shot']:.3f} | {statistics.fmean(accuracy):.3f} ± "
                f"{spread[0]:.3f} | {statistics.fmean(loss):.4f} ± {spread[1]:.4f} | {runs[0]['forward_passes']} | "
                f"{statistics.fmean(r['seconds'] for r in runs):.0f} |"
            )
        if args.reference in finals:
            lines += ratios(finals, args.reference)
        plot(finals, args.out / "curves.png", f"{args.task}, {Path(args.model).name}")
    table = "\n".join(lines)
    (args.out / "table.md").write_text(table + "\n")
    print("\n" + table)


if __name__ == "__main__":
    main()
