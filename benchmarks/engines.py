"""What a step costs in llama.cpp beside its own forwards, in time and memory, and beside the same step in torch.

    python benchmarks/engines.py --shapes tiny wide --outtypes f32 q8_0 q4_0 --threads 1 --repeats 9

For every shape (random weights) and type of weights, on one batch of texts with answers of one token: seconds of llama.cpp's bare forward
of the batch, and of one with a LoRA adapter of rank 2 loaded; of a step of `lozo` (two forwards), of a step of `lozo-g` along output
gradients (one), each over the bare forwards it needs; and of the same steps in torch, float32 and bfloat16. Medians of processor time over
repeats in which all contenders alternate. Then wall seconds of two forwards in one context with two threads and in two contexts with a
thread each; and, each in a process of its own, the peak resident set: of llama.cpp evaluating the batch, and
of the training steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8},
}
ROWS, TOKENS, VOCABULARY = 16, 32, 8192


def save(shape: str, folder: Path) -> None:
    """A random checkpoint of a shape with the bundled model's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zotune import bundled

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True, **SHAPES[shape])
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("tiny-lm") / name, folder)


def batch() -> dict[str, Any]:
    """Texts of random tokens, each with two options."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "positions": torch.full((ROWS, 1), TOKENS - 1),
        "option_ids": torch.tensor([[10, 11]] * ROWS),
        "answer": torch.arange(ROWS) % 2,
    }


def engine_model(path: Path, threads: int) -> Any:
    from zotune.engines.gguf.file import GGUFFile
    from zotune.engines.llama_cpp.llama import LlamaCpp, LlamaOptions
    from zotune.engines.model import EngineModel

    return EngineModel(LlamaCpp(GGUFFile(path), LlamaOptions(n_threads=threads)))


def torch_model(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers" in name and parameter.dim() == 2)  # the matrices that an engine trains
    return model


def steps(model: Any, method: str, data: dict[str, Any]) -> Callable[[], Any]:
    """A function that takes one step, past the steps that measure and observe."""
    from zotune import ZerothOrder, methods
    from zotune.objectives.losses import ChoiceLoss

    chosen = methods.get(method, **({"interval": 10**6} if method == "lozo-g" else {"interval": 50}))
    optimizer = ZerothOrder(model, dataclasses.replace(chosen, eps=1e-2), lr=1e-6, seed=0)
    loss = ChoiceLoss(model)
    for _ in range(2):
        optimizer.step(loss, data)
    return lambda: optimizer.step(loss, data)


def bare(model: Any, data: dict[str, Any]) -> Callable[[], Any]:
    """llama.cpp's forward of the batch alone, its rows prepared before."""
    from zotune.engines.model import rows_of

    rows = rows_of(data, data["positions"], model.engine)
    return lambda: model.engine.decode(rows)


def with_adapter(model: Any, data: dict[str, Any]) -> Callable[[], Any]:
    """The same with an adapter of rank 2 on every matrix, loaded once."""
    import torch

    draw = torch.Generator().manual_seed(0)
    factors = {n: tuple(1e-3 * torch.randn(size, 2, generator=draw) for size in shape) for n, shape in model.engine.matrices.items()}
    model.engine.set_factors({}, factors)
    return bare(model, data)


def times(folder: Path, outtype: str, threads: int, repeats: int, dtypes: list[str]) -> dict[str, float]:
    """Medians of processor seconds by contender, all in this process; ``dtypes``: those of torch."""
    import torch

    torch.set_num_threads(threads)
    data, path = batch(), folder / f"{outtype}.gguf"
    work: dict[str, Callable[[], Any]] = {
        "bare": bare(engine_model(path, threads), data),
        "adapter": with_adapter(engine_model(path, threads), data),
        "lozo": steps(engine_model(path, threads), "lozo", data),
        "lozo-g": steps(engine_model(path, threads), "lozo-g", data),
    }
    for dtype in dtypes:
        for method in ("lozo", "lozo-g"):
            work[f"torch {dtype} {method}"] = steps(torch_model(folder, dtype), method, data)
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            begin = time.process_time()
            call()
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()} | {
        f"{name} / bare": statistics.median(a / (b * forwards) for a, b in zip(found[name], found["bare"], strict=True))
        for name, forwards in (("adapter", 1), ("lozo", 2), ("lozo-g", 1))
    }


def contexts(folder: Path, outtype: str, repeats: int) -> dict[str, float]:
    """Wall seconds of two forwards: one after the other with two threads, and at a time with a thread each, sharing the file's pages."""
    from concurrent.futures import ThreadPoolExecutor

    path, data = folder / f"{outtype}.gguf", batch()
    one = bare(engine_model(path, 2), data)
    several = [bare(engine_model(path, 1), data) for _ in range(2)]
    found: dict[str, list[float]] = {"one context": [], "two contexts": []}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            one(), one()
            middle = time.perf_counter()
            list(pool.map(lambda call: call(), several))
            found["one context"].append(middle - begin)
            found["two contexts"].append(time.perf_counter() - middle)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def peak(folder: Path, outtype: str, what: str, threads: int) -> float:
    """Peak resident MB of a process that does this alone, three times."""
    pipe, end = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(end, folder, outtype, what, threads))
    process.start()
    value = pipe.recv()
    process.join()
    return value


def _peak(end: Any, folder: Path, outtype: str, what: str, threads: int) -> None:
    import torch

    from zotune import ZerothOrder
    from zotune.subspaces.guided_projection import fit_projection

    torch.set_num_threads(threads)
    alike = torch.nn.Linear(8, 8)  # what a first step imports and allocates is none of llama.cpp's
    ZerothOrder(alike, "lozo", lr=1e-3).step(lambda: alike(torch.ones(2, 8)).square().mean())
    fit_projection(*(torch.randn(64, 32) for _ in range(3)), rank=2)
    data = batch()
    if what.startswith("torch"):
        _, dtype, method = what.split()
        call = steps(torch_model(folder, dtype), method, data)
    else:
        model = engine_model(folder / f"{outtype}.gguf", threads)
        call = bare(model, data) if what == "bare" else with_adapter(model, data) if what == "adapter" else steps(model, what, data)
    for _ in range(3):
        call()
    status = Path("/proc/self/status").read_text()
    end.send(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def show(name: str, row: dict[str, float]) -> None:
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--outtypes", nargs="+", default=["f32", "q8_0", "q4_0"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="of the torch models beside it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    from zotune.engines.gguf.convert import convert

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = Path(scratch) / shape
            save(shape, folder)
            for outtype in options.outtypes:
                convert(folder, folder / f"{outtype}.gguf", outtype)
                dtypes = options.dtypes if outtype == options.outtypes[0] else []  # of torch, once a shape
                row = times(folder, outtype, options.threads, options.repeats, dtypes)
                show(f"{shape} {outtype}", row)
                contenders = ["bare", "adapter", "lozo", "lozo-g", *(f"torch {dtype} lozo-g" for dtype in dtypes)]
                more = contexts(folder, outtype, options.repeats)
                more |= {f"{what} MB": peak(folder, outtype, what, options.threads) for what in contenders}
                show(f"{shape} {outtype}", more)
                found[f"{shape} {outtype}"] = row | more
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
