"""What a training step costs beside the forward passes it needs.

    python benchmarks/step_time.py --shapes tiny-llama opt-125m gpt2 --batches 4x32 16x64 --dtypes float32 bfloat16

For every model shape (random weights), batch × tokens, dtype and method: milliseconds of a step, over milliseconds of the bare forwards it
needs (eval mode, no grad, the same loss; one forward of the stacked rows for a batched step, one forward of the batch for each point of
a sequential one), the speed over a plain implementation of published MeZO, and the peak of tensor bytes alive during the step over that of
one bare forward of the batch, weights and state counted in both. Beside them AdamW with backprop. Times are medians over repeats in which
all contenders alternate, "step / bare" the median of the repeats' ratios; "least / least" is what a busy machine disturbs least, "mean /
mean" has the steps in it that fold and redraw, given more repeats than an interval has steps. On a GPU:

    python benchmarks/step_time.py --device cuda --alone --repeats 51 --shapes opt-1.3b --batches 1x256 16x256 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from backprop_steps import BACKPROP, BackpropStep, with_adapters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zotune

SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "opt-125m": ("OPTConfig", "OPTForCausalLM", {}),  # the configuration's defaults are this model
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "llama-300m": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "opt-1.3b": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
    ),
    "opt-13b": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40, "word_embed_proj_dim": 5120},
    ),
}
PUBLISHED = "published MeZO"
#: name: (method, its options, forward_batching); "on LoRA": of adapters on a frozen model
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lozo": ("lozo", {}, "batched"),
    "lozo, sequential": ("lozo", {}, "sequential"),
    "lozo, 4 directions": ("lozo", {"num_directions": 4}, "batched"),
    "lozo-e": ("lozo-e", {}, "batched"),
    "lozo-e, sequential": ("lozo-e", {}, "sequential"),
    "lozo-e, two forwards": ("lozo-e", {"num_directions": 1, "estimator": "central"}, "batched"),
    "lozo-g, guided": ("lozo-g", {}, "sequential"),
    "lozo-m, one per example": ("lozo-m", {"directions_per": "example", "rank": 1}, "batched"),
    "mezo": ("mezo", {}, "sequential"),
    "mezo, rademacher": ("mezo", {"direction": "rademacher"}, "sequential"),
    "mezo, batched": ("mezo", {}, "batched"),
    "mezo, rademacher, batched": ("mezo", {"direction": "rademacher"}, "batched"),
    "mezo on LoRA": ("mezo", {}, "batched"),
    "mezo on LoRA, one per example": ("mezo", {"directions_per": "example"}, "batched"),
}


DEFAULT = ["lozo", "lozo, sequential", "lozo-e", "mezo", PUBLISHED, *BACKPROP]
CAPTURE: dict[str, bool | str] = {"auto": "auto", "always": True, "never": False}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class PublishedMeZO:
    """MeZO as published (2305.17333): one seed per step for torch's global generator, from which the same normals are drawn again for
    θ + εz, θ − εz, back to θ, and the update: four passes over the weights, in place."""

    def __init__(self, model: nn.Module, lr: float = 1e-6, eps: float = 1e-3) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps = lr, eps

    def _move(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            z = torch.normal(mean=0, std=1, size=parameter.shape, device=parameter.device, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> None:
        seed = int(torch.randint(1 << 30, ()))
        self._move(seed, self.eps)
        plus = loss_fn(batch).mean().item()
        self._move(seed, -2 * self.eps)
        minus = loss_fn(batch).mean().item()
        self._move(seed, self.eps)
        self._move(seed, -self.lr * (plus - minus) / (2 * self.eps))


def build(shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import transformers

    config, model, fields = SHAPES[shape]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a model of billions of weights is made where it will be, and once
    try:
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    finally:
        torch.set_default_dtype(before)


def make_batch(rows: int, tokens: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """A prompt whose answer is the last token: the head is asked at one position a row. Of several the first is two tokens shorter."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[: min(1, rows - 1), :2] = 0
    return {
        "input_ids": torch.randint(5, vocabulary, (rows, tokens), generator=generator).to(device),
        "attention_mask": mask.to(device),
        "positions": torch.full((rows, 1), tokens - 2, device=device),
        "targets": torch.randint(5, vocabulary, (rows, 1), generator=generator).to(device),
    }


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made inside the block that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in [*args, *(kwargs or {}).values()] if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                if pointer not in self.seen and pointer not in given and size:
                    self.seen[pointer] = size
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, pointer)
        return result

    def _gone(self, pointer: int) -> None:
        self.live -= self.seen.pop(pointer, 0)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as tracker:
        work()
    return tracker.peak


def timed(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def measure(
    shape: str,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    names: list[str],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float],
    alone: bool = False,
    cuda_graphs: bool | str = "auto",
) -> list[dict]:
    """A row for each of ``names``; ``alone``: one name, whose optimizer trains the model that the bare forwards are of."""
    assert not alone or len(names) == 1
    plain = build(shape, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    batch = make_batch(rows, tokens, plain.config.vocab_size, device)
    plain_loss = zotune.objectives.LanguageModelLoss(plain)

    def forward(copies: int, times: int, loss: Callable[[Any], Tensor] = plain_loss) -> Callable[[], object]:
        stacked = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in batch.items()}

        @torch.no_grad()
        def work() -> None:
            for _ in range(times):
                loss(stacked).sum().item()

        return work

    contenders: dict[str, Callable[[], object]] = {}
    bare: dict[str, str] = {}
    states: dict[str, Callable[[], int]] = {}
    times: dict[str, list[float]] = {}

    def compare_with(name: str, what: str, work: Callable[[], object]) -> None:
        bare[name] = what
        if what in contenders:
            return
        contenders[what] = work
        if alone:  # before an optimizer has hooks in the model
            work()
            times[what] = [timed(work, device, clock) for _ in range(repeats)]

    for name in names:
        model = plain if alone else copy.deepcopy(plain)
        if name in BACKPROP:
            compare_with(name, f"1 forward of 1 × {rows} rows", forward(1, 1))
            baseline = BackpropStep(model, *BACKPROP[name], zotune.objectives.LanguageModelLoss)
            contenders[name], states[name] = partial(baseline.step, batch), baseline.state_bytes
            continue
        if name == PUBLISHED:
            compare_with(name, f"2 forwards of {rows} rows", forward(1, 2))
            published = PublishedMeZO(model)
            contenders[name], states[name] = partial(published.step, zotune.objectives.LanguageModelLoss(model), batch), lambda: 0
            continue
        method_name, options, forward_batching = METHODS[name]
        method = zotune.methods.get(method_name, **options)
        if "on LoRA" in name:
            model = with_adapters(model)
        points = 1 if name == "lozo-g, guided" else method.forwards_per_step
        together = forward_batching == "batched"
        own = f"{name}'s own " if "on LoRA" in name else ""  # an adapter's two products are part of its forward
        what = own + (f"1 forward of {points} × {rows} rows" if together else f"{points} forwards of {rows} rows")
        loss = zotune.objectives.LanguageModelLoss(model) if own else plain_loss
        compare_with(name, what, forward(points, 1, loss) if together else forward(1, points, loss))
        examples = make_batch(128, tokens, plain.config.vocab_size, device)
        pieces = [{key: value[at : at + rows] for key, value in examples.items()} for at in range(0, 128, rows)]
        optimizer = zotune.ZerothOrder(
            model,
            method,
            lr=1e-7,
            forward_batching=forward_batching,
            cuda_graphs=cuda_graphs,
            sample_batches=lambda step, count, pieces=pieces: pieces,
        )
        contenders[name] = partial(optimizer.step, zotune.objectives.LanguageModelLoss(model), batch)
        shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        states[name] = partial(method.state_bytes, shapes, half=dtype != torch.float32)

    working = {name: work for name, work in contenders.items() if name not in times}
    for work in working.values():
        work()
    inference = peak_bytes(forward(1, 1), device)
    peaks = {name: peak_bytes(contenders[name], device) for name in names}
    times |= {name: [] for name in working}
    for _ in range(repeats):
        for name, work in working.items():
            times[name].append(timed(work, device, clock))
    median = {name: statistics.median(values) for name, values in times.items()}
    results = []
    for name in names:
        state, peak = states[name](), peaks[name]
        # paired by repeat, so that a load that comes and goes hits both
        ratios = [step / forwards for step, forwards in zip(times[name], times[bare[name]], strict=True)]
        results.append(
            {
                "shape": shape,
                "batch": f"{rows}x{tokens}",
                "dtype": str(dtype).removeprefix("torch."),
                "method": name,
                "step_ms": median[name],
                "bare": bare[name],
                "bare_ms": median[bare[name]],
                "over_bare": statistics.median(ratios),
                "least_over_least": min(times[name]) / min(times[bare[name]]),
                "mean_over_mean": statistics.fmean(times[name]) / statistics.fmean(times[bare[name]]),
                "peak_over_inference": (weights + state + peak) / (weights + state + inference),
                "extra_mb": (peak - inference) / 1e6,
                "state_mb": state / 1e6,
            }
        )
    return results


def table(results: list[dict]) -> str:
    titles = ["shape", "batch", "dtype", "method", "step ms", "bare ms", "step / bare", "least / least", "mean / mean", "× published MeZO"]
    published = {r["method"]: r["step_ms"] for r in results}.get(PUBLISHED)
    titles += ["peak / inference", "extra MB", "state MB"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in results:
        over = "" if published is None else f"{published / r['step_ms']:.2f}"
        cells = [r["shape"], r["batch"], r["dtype"], r["method"], f"{r['step_ms']:.1f}", f"{r['bare_ms']:.1f}", f"{r['over_bare']:.2f}"]
        cells += [f"{r['least_over_least']:.2f}", f"{r['mean_over_mean']:.2f}", over, f"{r['peak_over_inference']:.2f}"]
        cells += [f"{r['extra_mb']:.1f}", f"{r['state_mb']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny-llama", "opt-125m", "gpt2"])
    parser.add_argument("--batches", nargs="+", default=["4x32", "16x64"], help="rows x tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, PUBLISHED, *BACKPROP], default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="a method after the other, each on a model made for it: for large models")
    parser.add_argument("--cuda_graphs", choices=CAPTURE, default="auto", help="which batched evaluations are replayed as CUDA graphs")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time on the processor, for a machine that others use too")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured.")
        return
    results = []
    for shape in args.shapes:
        for batch in args.batches:
            rows, _, tokens = batch.partition("x")
            for dtype in args.dtypes:
                dtype = getattr(torch, dtype)
                place, clock = torch.device(args.device), CLOCKS[args.clock]
                sizes = (shape, int(rows), int(tokens), dtype)
                groups = [[name] for name in args.methods] if args.alone else [args.methods]
                how = (args.repeats, place, clock, args.alone, CAPTURE[args.cuda_graphs])
                found = [r for names in groups for r in measure(*sizes, names, *how)]
                print(table(found), flush=True)
                results += found
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
