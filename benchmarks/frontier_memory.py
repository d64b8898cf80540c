"""Predicted memory of a step of forward-only training and of cheap backprop, by model size and by sequence length.

    python benchmarks/frontier_memory.py

Weights in bfloat16, one sequence a batch, 16 scored tokens, as on a GPU, by the ledger of ``zotune estimate`` on tensors without values.
Rows: what the bare forward takes; the default; AdamW on all weights (float32 copies of them), on LoRA adapters with and without gradient
checkpointing, on the last block alone; AdaLomo, whose update happens within the backward pass, and BAdam, AdamW on one block at a time (its
first, which takes most), both with checkpointing. The default's points are evaluated one after the other. Figures are kept in
benchmarks/results/frontier_memory.json; the chart goes to docs/images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from backprop import BlockAdam, Fused, blocks, last_block, train_only

from zotune.baselines import FirstOrder, catalog
from zotune.io.figures import new_figure, save_figure
from zotune.memory import Workload, config_of, estimate
from zotune.memory.dry_run import dry_run
from zotune.memory.ledger import Ledger
from zotune.memory.shapes import build, depth_of, shallow
from zotune.memory.workload import batch_of
from zotune.objectives.losses import objective
from zotune.training.schemes import Scheme

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGE = ROOT / "benchmarks/results/frontier_memory.json", ROOT / "docs/images/frontier_memory.png"
MODELS = {
    "facebook/opt-1.3b": 1.3,
    "meta-llama/Llama-2-7b-hf": 6.7,
    "meta-llama/Llama-2-13b-hf": 13.0,
    "meta-llama/Llama-2-70b-hf": 69.0,
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BY_LENGTH, LENGTH = "meta-llama/Llama-2-7b-hf", 2048
#: Rows that ``zotune estimate`` knows: (method, scheme, checkpointing).
KNOWN = {
    "forward pass": ("zero-shot", "full", False),
    "lozo-g (default)": ("lozo-g", "full", False),
    "AdamW, LoRA": ("fo-adamw", "lora", False),
    "AdamW, LoRA, checkpointing": ("fo-adamw", "lora", True),
    "AdamW, all": ("fo-adamw", "full", False),
}
STEPS = 2


def last_blocks(model: Any) -> Any:
    train_only(model, last_block(model))
    return FirstOrder(model, "fo-adamw", lr=1e-6)


def fused(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return Fused(model, 1e-6)


class FirstBlock(BlockAdam):
    """BAdam at its first block, where the backward pass is longest."""

    def __init__(self, model: Any) -> None:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        super().__init__(model, 1e-6, 0)
        self.order = iter([blocks(model)[0]] * STEPS)


#: Other rows: what makes the optimizer of a model.
MADE: dict[str, Callable[[Any], Any]] = {
    "AdamW, last block": last_blocks,
    "AdaLomo, checkpointing": fused,
    "BAdam, checkpointing": FirstBlock,
}
COLORS = dict(zip([*KNOWN, *MADE], ("#000000", "#cc3311", "#88ccee", "#0077bb", "#bbbbbb", "#009988", "#ee7733", "#aa3377"), strict=True))


def peaks(workload: Workload, made: Callable[[Any], Any]) -> dict[str, int]:
    """Bytes at the peaks of two steps at this depth, by moment of a step."""
    with dry_run(accelerator=True):
        model: Any = build(workload.config, workload.dtype)
        batch = batch_of(workload)
        ledger = Ledger(model, host=False)
        ledger.add(batch.values(), "temporary")
        loss_fn = objective("lm", model)
        with ledger:
            optimizer = made(model)
            for _ in range(STEPS):
                ledger.begin_step()
                optimizer.step(loss_fn, batch)
        return {moment: split.total for moment, split in ledger.peaks().items()}


def predicted(name: str, row: str, length: int) -> float:
    """Gigabytes, 10⁹ bytes."""
    config = config_of(name)
    text = config.get_text_config()
    text.max_position_embeddings = max(text.max_position_embeddings, length)
    workload = Workload(config, catalog.get("zero-shot"), batch_size=1, sequence_length=length, dtype=torch.bfloat16, scored=16)
    if row in KNOWN:
        method, scheme, checkpointing = KNOWN[row]
        plan = replace(workload, method=catalog.get(method), scheme=Scheme(scheme), activation_checkpointing=checkpointing)
        plan = replace(plan, forward_batching="sequential")
        return estimate(plan, accelerator=True).total / 1e9
    few, more = (peaks(workload.with_(config=shallow(config, layers)), MADE[row]) for layers in (2, 3))
    return max(few[moment] + (depth_of(config) - 2) * (more[moment] - few[moment]) for moment in more if moment in few) / 1e9


def figures() -> dict[str, float]:
    """Gigabytes by "model, row, length"; what is on file is not predicted again."""
    found: dict[str, float] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [(name, LENGTH) for name in MODELS] + [(BY_LENGTH, length) for length in LENGTHS]
    for name, length in dict.fromkeys(wanted):
        for row in [*KNOWN, *MADE]:
            key = f"{name}, {row}, {length}"
            if key not in found:
                found[key] = round(predicted(name, row, length), 2)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(key, found[key], flush=True)
    return found


def beyond(found: dict[str, float], name: str, row: str, length: int) -> float:
    """Gigabytes more than a forward pass takes, of which the chart shows 0.03 at least."""
    return max(0.03, found[f"{name}, {row}, {length}"] - found[f"{name}, forward pass, {length}"])


def main() -> None:
    found = figures()
    figure, ((left, right),) = new_figure(1, 2, (11.5, 4))
    for row, color in COLORS.items():
        if row == "forward pass":
            continue
        style = {"color": color, "linewidth": 2.5 if row.startswith("lozo") else 1.4, "marker": "o", "markersize": 3, "label": row}
        left.plot(LENGTHS, [beyond(found, BY_LENGTH, row, length) for length in LENGTHS], **style)
        right.plot(list(MODELS.values()), [beyond(found, name, row, LENGTH) for name in MODELS], **style)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="GB beyond a forward pass (predicted)")
    left.set(xlabel="tokens of a sequence", title="Llama-2-7B, one sequence", xticks=LENGTHS, xticklabels=[str(n) for n in LENGTHS])
    right.set(xlabel="parameters, 10⁹", title=f"one sequence of {LENGTH} tokens", xticks=list(MODELS.values()))
    right.set_xticklabels([f"{n:g}" for n in MODELS.values()])
    for axes in (left, right):
        axes.minorticks_off()
    right.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, IMAGE)
    for title, columns in (
        ("GB by tokens, Llama-2-7B", [(BY_LENGTH, n, str(n)) for n in LENGTHS]),
        (f"GB by model, {LENGTH} tokens", [(name, LENGTH, name.split("/")[1]) for name in MODELS]),
    ):
        print(f"\n| {title} | {' | '.join(label for *_, label in columns)} |\n|---|" + "---|" * len(columns))
        for row in COLORS:
            print(f"| {row} | " + " | ".join(f"{found[f'{name}, {row}, {length}']:.1f}" for name, length, _ in columns) + " |")


if __name__ == "__main__":
    main()
