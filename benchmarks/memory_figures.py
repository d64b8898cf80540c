"""The field's two memory figures, predicted by zotune with the published figures beside them.

    python benchmarks/memory_figures.py [sizes] [lengths] [roberta]

- sizes: memory against model size (MeZO, 2305.17333, figure 3 and table 22: MultiRC, about 400 tokens, batch 1);
- lengths: memory against sequence length (after ZO-Bench, 2402.11592), with its closed formulas;
- roberta: LOZO's table of RoBERTa-large (2410.07698).

Figures are kept in benchmarks/results/memory_*.json and not predicted again; the charts go to docs/images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from zotune.baselines import catalog
from zotune.io.figures import new_figure, save_figure
from zotune.memory import Split, Workload, config_of, estimate
from zotune.memory.formulas import closed_form
from zotune.memory.workload import elements_of
from zotune.training.schemes import Scheme

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"

#: Parameters in 10⁹ by model, and gigabytes by method: MeZO, table 22.
MODELS = {"opt-1.3b": 1.3, "opt-2.7b": 2.7, "opt-6.7b": 6.7, "opt-13b": 13.0, "opt-30b": 30.0, "opt-66b": 66.0}
PUBLISHED = {
    "zero-shot": (4, 7, 14, 26, 58, 128),
    "MeZO": (4, 7, 14, 26, 58, 128),
    "prefix FT": (19, 29, 46, 158, 315, None),
    "full FT": (27, 55, 156, 316, 633, None),
}
#: name -> (method, scheme, dtype). Those authors trained in float32 and evaluated in float16.
BY_SIZE = {
    "zero-shot": ("zero-shot", "full", torch.float16),
    "MeZO": ("mezo", "full", torch.float16),
    "LOZO": ("lozo", "full", torch.float16),
    "prefix FT": ("fo-adamw", "prefix", torch.float32),
    "full FT": ("fo-adamw", "full", torch.float32),
}
BY_LENGTH = {
    "FO-Adam": ("fo-adamw", "full", torch.bfloat16),
    "FO-SGD": ("fo-sgd", "full", torch.bfloat16),
    "LoRA, FO-Adam": ("fo-adamw", "lora", torch.bfloat16),
    "MeZO": ("mezo", "full", torch.bfloat16),
    "LOZO": ("lozo", "full", torch.bfloat16),
}
LENGTHS = (128, 512, 1024, 2048)
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#cc9911")
#: LOZO's table: gigabytes on RoBERTa-large.
ROBERTA = {"lozo": 2.83, "lozo-m": 2.84, "mezo": 3.00, "mezo-momentum": 5.89, "mezo-adam": 7.42}


class Kept:
    """Predictions by key, in a JSON file."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"memory_{name}.json"
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key: str, workload: Workload) -> dict[str, int]:
        if key not in self.values:
            found: Split = estimate(workload, accelerator=True)
            self.values[key] = found.kinds
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")
            print(f"{key}: {found.total / 1e9:.2f} GB", flush=True)
        return self.values[key]


def sizes() -> None:
    kept = Kept("sizes")
    lines: dict[str, list[float]] = {}
    for name, (method, scheme, dtype) in BY_SIZE.items():
        for model in MODELS:
            work = Workload(config_of(model), catalog.get(method), Scheme(scheme), batch_size=1, sequence_length=400, dtype=dtype)
            lines.setdefault(name, []).append(sum(kept.get(f"{model} {name}", work).values()) / 1e9)
    figure, axis = _axis()
    for (name, line), color in zip(lines.items(), COLORS, strict=True):
        axis.plot(list(MODELS.values()), line, "-", color=color, label=f"{name}, predicted")
        points = [(size, value) for size, value in zip(MODELS.values(), PUBLISHED.get(name, ()), strict=False) if value]
        if points:
            axis.plot(
                *zip(*points, strict=True), "o", color=color, mfc="none" if name == "zero-shot" else color, label=f"{name}, published"
            )
    axis.set(xscale="log", yscale="log", xlabel="parameters, 10⁹", ylabel="peak memory, GB", title="OPT, batch 1, 400 tokens")
    axis.set_xticks(list(MODELS.values()), [f"{size:g}" for size in MODELS.values()])
    axis.minorticks_off()
    _save(figure, axis, "memory_sizes.png")


def lengths() -> None:
    kept = Kept("lengths")
    config = config_of("opt-13b")
    figure, axis = _axis()
    for (name, (method, scheme, dtype)), color in zip(BY_LENGTH.items(), COLORS, strict=True):
        line, theory = [], []
        for length in LENGTHS:
            work = Workload(config, catalog.get(method), Scheme(scheme), batch_size=4, sequence_length=length, dtype=dtype)
            kinds = kept.get(f"{length} {name}", work)
            line.append(sum(kinds.values()) / 1e9)
            if scheme == "full" and method in ("fo-adamw", "fo-sgd", "mezo"):
                total, largest = elements_of(work)
                # The saved activations are those of FO-SGD, whose peak is at the end of the forward pass.
                saved = kept.get(f"{length} FO-SGD", work.with_(method=catalog.get("fo-sgd")))["activations"]
                theory.append((closed_form(method, total, largest, saved) or 0) / 1e9)
        axis.plot(LENGTHS, line, "o-", color=color, label=name)
        if theory:
            axis.plot(LENGTHS, theory, "--", color=color, label=f"{name}, ZO-Bench's formula", linewidth=1)
    axis.set(xlabel="tokens", ylabel="peak memory, GB", title="OPT-13B, bfloat16, batch 4", ylim=(0, None))
    _save(figure, axis, "memory_lengths.png")


def roberta() -> None:
    kept = Kept("roberta")
    for method, published in ROBERTA.items():
        work = Workload(config_of("roberta-large"), catalog.get(method), batch_size=64, sequence_length=128, forward_batching="sequential")
        print(f"{method:<14} predicted {sum(kept.get(method, work).values()) / 1e9:.2f} GB, published {published:.2f}")


def _axis() -> tuple[Any, Any]:
    figure, panels = new_figure(1, 1, (7.5, 5.2))
    return figure, panels[0][0]


def _save(figure: Any, axis: Any, name: str) -> None:
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    IMAGES.mkdir(exist_ok=True)
    save_figure(figure, IMAGES / name)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["sizes", "lengths", "roberta"]:
        {"sizes": sizes, "lengths": lengths, "roberta": roberta}[chosen]()
