"""What a GGUF file learns in llama.cpp beside the same model in torch: accuracy on two tasks, three seeds.

    python benchmarks/gguf_learning.py --models models --data_dir data --output_dir runs/gguf --figure docs/images/gguf_learning.png

`models` holds the checkpoint in `tiny-lm` and its conversions `tiny-f32.gguf`, `tiny-q8_0.gguf`, `tiny-q4_0.gguf` (`zotune convert`). All
runs are `lozo-g` with measured rates: 120 steps of 16 out of 1,000 examples, evaluated on 300, on the matrices that an engine trains. A run
that has ended is not repeated. Prints a table of accuracies, mean ± standard error over seeds, and of sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = {"torch": "torch, float32", "f32": "llama.cpp, F32", "q8_0": "llama.cpp, Q8_0", "q4_0": "llama.cpp, Q4_0"}
OPTIONS = (
    "--num_train 1000 --num_eval 300 --max_steps 120 --eval_strategy steps --eval_steps 40 --save_strategy no --logging_steps 20 "
    "--per_device_train_batch_size 16"
)


def train(models: Path, data: Path, task: str, model: str, seed: int, folder: Path) -> None:
    """One run, unless it has ended before."""
    if (folder / "summary.json").is_file():
        return
    if model == "torch":
        which = ["--model_name_or_path", str(models / "tiny-lm"), "--trainable", "_proj.weight"]
    else:
        which = ["--model_name_or_path", str(models / f"tiny-{model}.gguf"), "--n_threads", "1"]
    words = [*which, "--task", task, "--data_dir", str(data), *OPTIONS.split(), "--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "zotune", "train", *words, "--overwrite_output_dir"], check=True)


def read(folder: Path) -> dict[str, Any]:
    """Accuracies by step, loss after training, and sequences of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    entries = json.loads((folder / "history.json").read_text())["entries"]
    curve = {0: summary["before"]["accuracy"]} | {e["step"]: e["eval_accuracy"] for e in entries if "eval_accuracy" in e}
    return {"curve": curve, "after": summary["after"], "sequences": summary["sequences_evaluated"], "seconds": summary["training_seconds"]}


def spread(values: list[float], form: str) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} ± {error:{form}}"


def draw(found: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(tasks), 3.2), layout="constrained")
    for place, task in enumerate(tasks, 1):
        axes = figure.add_subplot(1, len(tasks), place, title=task, xlabel="steps", ylabel="accuracy, %")
        for shift, (model, label) in enumerate(MODELS.items()):
            runs = found.get((task, model), [])
            if not runs:
                continue
            steps = sorted(runs[0]["curve"])
            table = [[100 * run["curve"][step] for run in runs] for step in steps]
            errors = [statistics.stdev(row) / math.sqrt(len(row)) if len(row) > 1 else 0.0 for row in table]
            places = [step + 1.5 * (shift - 1.5) for step in steps]
            axes.errorbar(places, [statistics.mean(row) for row in table], errors, marker="o", markersize=4, capsize=2, label=label)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for task in options.tasks:
            for model in MODELS:
                folder = options.output_dir / f"{task}-{model}-{seed}"
                train(options.models, options.data_dir, task, model, seed, folder)
                found.setdefault((task, model), []).append(read(folder))
    print("| task | engine | before | after 120 steps | loss after | sequences |\n|---|---|---|---|---|---|")
    for (task, model), runs in found.items():
        before, after = ([100 * run["curve"][step] for run in runs] for step in (0, max(runs[0]["curve"])))
        losses, sequences = [run["after"]["loss"] for run in runs], [run["sequences"] for run in runs]
        cells = [
            task,
            MODELS[model],
            spread(before, ".1f"),
            spread(after, ".1f"),
            spread(losses, ".3f"),
            f"{statistics.mean(sequences):,.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    if options.figure:
        draw(found, options.tasks, options.figure)


if __name__ == "__main__":
    main()
