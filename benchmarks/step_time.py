"""What a training step costs beside the forward passes it needs.

    python benchmarks/step_time.py --shapes tiny-llama opt-125m gpt2 --batches 4x32 16x64 --dtypes float32 bfloat16

For every model shape (random weights), batch × tokens, dtype and method: milliseconds of a step, over milliseconds of the bare forwards it
needs (eval mode, no grad, the same loss; one forward of the stacked rows for a batched probe, one forward of the batch for each point of a
sequential one), the speed over a plain implementation of published MeZO, and the peak of tensor bytes alive during the step over that of
one bare forward of the batch, weights and state counted in both. Times are medians over repeats in which all contenders take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
}
#: name: (method, its options, probe)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lozo": ("lozo", {}, "batched"),
    "lozo, sequential": ("lozo", {}, "sequential"),
    "lozo, 4 directions": ("lozo", {"num_directions": 4}, "batched"),
    "lozo-e": ("lozo-e", {}, "batched"),
    "lozo-m, one an example": ("lozo-m", {"num_directions": "example", "rank": 1}, "batched"),
    "mezo": ("mezo", {}, "sequential"),
    "mezo, rademacher": ("mezo", {"direction": "rademacher"}, "sequential"),
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class PublishedMeZO:
    """MeZO as published (2305.17333): one seed a step for torch's global generator, from which the same normals are drawn again for
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**fields)).to(device, dtype).eval()


def make_batch(rows: int, tokens: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """A prompt whose answer is the last token: the head is asked at one position a row."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(5, vocabulary, (rows, tokens), generator=generator).to(device),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long, device=device),
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
    shape: str, rows: int, tokens: int, dtype: torch.dtype, names: list[str], repeats: int, device: torch.device, clock: Callable[[], float]
) -> list[dict]:
    plain = build(shape, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    batch = make_batch(rows, tokens, plain.config.vocab_size, device)
    plain_loss = zotune.objectives.LanguageModelLoss(plain)

    def forward(copies: int, times: int) -> Callable[[], object]:
        stacked = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in batch.items()}

        @torch.no_grad()
        def work() -> None:
            for _ in range(times):
                plain_loss(stacked).sum().item()

        return work

    contenders: dict[str, Callable[[], object]] = {}
    bare: dict[str, str] = {}
    optimizers: dict[str, zotune.ZerothOrder] = {}
    for name in names:
        method_name, options, probe = METHODS[name]
        model = copy.deepcopy(plain)
        method = zotune.methods.get(method_name, **options)
        optimizer = optimizers[name] = zotune.ZerothOrder(model, method, lr=1e-7, probe=probe)
        loss = zotune.objectives.LanguageModelLoss(model)
        contenders[name] = lambda optimizer=optimizer, loss=loss: optimizer.step(loss, batch)
        points = method.forwards_per_step
        bare[name] = f"1 forward of {points} × {rows} rows" if probe == "batched" else f"{points} forwards of {rows} rows"
        contenders[bare[name]] = forward(points, 1) if probe == "batched" else forward(1, points)
    published_model = copy.deepcopy(plain)
    published, published_loss = PublishedMeZO(published_model), zotune.objectives.LanguageModelLoss(published_model)
    contenders["published MeZO"] = lambda: published.step(published_loss, batch)
    bare["published MeZO"] = f"2 forwards of {rows} rows"
    contenders.setdefault(bare["published MeZO"], forward(1, 2))

    for work in contenders.values():
        work(), work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            times[name].append(timed(work, device, clock))
    median = {name: statistics.median(values) for name, values in times.items()}
    inference = peak_bytes(forward(1, 1), device)
    results = []
    for name in [*names, "published MeZO"]:
        state = 0
        if name in optimizers:
            shapes = [tuple(p.shape) for p in plain.parameters()]
            state = optimizers[name].method.state_bytes(shapes, half=dtype != torch.float32)
        peak = peak_bytes(contenders[name], device)
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
                "over_published": median["published MeZO"] / median[name],
                "peak_over_inference": (weights + state + peak) / (weights + state + inference),
                "extra_mb": (peak - inference) / 1e6,
                "state_mb": state / 1e6,
            }
        )
    return results


def table(results: list[dict]) -> str:
    lines = [
        "| shape | batch | dtype | method | step ms | bare ms | step / bare | × published MeZO | peak / inference | extra MB | state MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['shape']} | {r['batch']} | {r['dtype']} | {r['method']} | {r['step_ms']:.1f} | {r['bare_ms']:.1f} | {r['over_bare']:.2f} | "
        f"{r['over_published']:.2f} | {r['peak_over_inference']:.2f} | {r['extra_mb']:.1f} | {r['state_mb']:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny-llama", "opt-125m", "gpt2"])
    parser.add_argument("--batches", nargs="+", default=["4x32", "16x64"], help="rows x tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lozo", "lozo, sequential", "lozo-e", "mezo"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time on the processor, for a machine that others use too")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for shape in args.shapes:
        for batch in args.batches:
            rows, _, tokens = batch.partition("x")
            for dtype in args.dtypes:
                dtype = getattr(torch, dtype)
                place, clock = torch.device(args.device), CLOCKS[args.clock]
                found = measure(shape, int(rows), int(tokens), dtype, args.methods, args.repeats, place, clock)
                print(table(found), flush=True)
                results += found
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
