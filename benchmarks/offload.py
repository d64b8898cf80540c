"""Training from disk under a hard memory limit, beside the same run in memory and accelerate's disk offload.

    python benchmarks/offload.py make /scratch/model --layers 33       # a Llama-like model, random bfloat16 weights, in shards
    python benchmarks/offload.py compare /scratch/model --steps 4      # all of it, a process each; needs the right to make a cgroup

The limit is that of a memory cgroup (version 1 or 2), which counts the page cache, a quarter of the weights. `disk` and `memory` train
with equal seeds, and their losses and coefficients are compared; `accelerate` only evaluates, in one forward of the stacked rows and
in two, one a point; `bandwidth` reads the shards past the page cache and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VOCABULARY, WIDTH, INNER = 32000, 2048, 8192


def make(folder: Path, layers: int) -> None:
    """Write the model without ever holding it whole."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    generator, index, total = torch.Generator().manual_seed(0), {}, 0

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    shard(0, {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "model.norm.weight": torch.ones(WIDTH).bfloat16()})
    for first in range(0, layers, 4):
        tensors = {}
        for layer in range(first, min(first + 4, layers)):
            name = f"model.layers.{layer}."
            tensors |= {f"{name}self_attn.{part}_proj.weight": matrix(WIDTH, WIDTH) for part in "qkvo"}
            tensors |= {f"{name}mlp.{part}_proj.weight": matrix(INNER, WIDTH) for part in ("gate", "up")}
            tensors[f"{name}mlp.down_proj.weight"] = matrix(WIDTH, INNER)
            tensors |= {f"{name}{part}_layernorm.weight": torch.ones(WIDTH).bfloat16() for part in ("input", "post_attention")}
        shard(first // 4 + 1, tensors)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    print(f"{folder}: {total / 2**30:.2f} GiB")


def rows(args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (args.batch_size, args.length), generator=torch.Generator().manual_seed(1))


def loss_of(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def losses(ids: torch.Tensor) -> torch.Tensor:
        scored = torch.tensor([ids.shape[1] - 2])  # a slice would have torch copy the head's weight for every row
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=scored).logits.float()
        return torch.nn.functional.cross_entropy(logits[:, 0], ids[:, -1], reduction="none")

    return losses


def with_scheme(model: torch.nn.Module, scheme: str) -> torch.nn.Module:
    if scheme == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    return model


def train(args: argparse.Namespace) -> dict[str, Any]:
    """LOZO, or MeZO on an adapter, from disk or in memory."""
    from transformers import AutoModelForCausalLM

    from zotune import ZerothOrder, methods
    from zotune.training.offloaded_loading import load
    from zotune.weights.offload import stream_of

    begin = time.perf_counter()
    if args.what == "disk":
        model = load(args.model, dtype=torch.bfloat16, scratch=args.scratch)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = with_scheme(model, args.scheme)
    method = methods.lozo(rank=2, interval=args.interval, eps=1e-3) if args.scheme == "lozo" else methods.mezo(eps=1e-2)
    optimizer = ZerothOrder(model, method, lr=1e-6 if args.scheme == "lozo" else 1e-4, seed=0, forward_batching="batched")
    loading, ids, loss_fn = time.perf_counter() - begin, rows(args), loss_of(model)
    found: dict[str, Any] = {"loading": loading, "seconds": [], "losses": [], "coefficients": []}
    stream = stream_of(model)
    for _ in range(args.steps):
        begin = time.perf_counter()
        found["losses"].append(float(optimizer.step(loss_fn, ids)))
        found["seconds"].append(time.perf_counter() - begin)
        found["coefficients"] += optimizer.last_report.coefficients.tolist()
        print(f"{args.what} {args.scheme} {found['seconds'][-1]:.2f} s  {found['losses'][-1]:.6f}", file=sys.stderr, flush=True)
    if stream is not None:
        found["stream"] = vars(stream.traffic)
    return found


def accelerate(args: argparse.Namespace) -> dict[str, Any]:
    """The forwards of a step by accelerate's hooks: of all rows stacked, and one for each of the two points."""
    from transformers import AutoModelForCausalLM

    begin = time.perf_counter()
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map=placed, offload_folder=args.scratch)
    found: dict[str, Any] = {"loading": time.perf_counter() - begin}
    loss_fn = loss_of(model)
    for name, ids, forwards in (("stacked", rows(args).repeat(2, 1), 1), ("two_forwards", rows(args), 2)):
        found[name] = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            with torch.no_grad():
                for _ in range(forwards):
                    loss_fn(ids)
            found[name].append(time.perf_counter() - begin)
            print(f"accelerate, {name}: {found[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return found


def bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of reading the shards past the page cache."""
    from zotune.weights.offload import direct_io

    reader, into, seconds, size = direct_io.DirectFiles(), direct_io.page_aligned(256 << 20), 0.0, 0
    for path in sorted(args.model.glob("*.safetensors")):
        count = path.stat().st_size
        for first in range(0, count, 256 << 20):
            segment = direct_io.Segment(str(path), first, direct_io.pages(min(256 << 20, count - first)), 0)
            begin = time.perf_counter()
            reader.read([segment], into)
            seconds += time.perf_counter() - begin
        size += count
    return {"bytes": size, "bytes_per_second": size / seconds}


def forget(folder: Path) -> None:
    """Have the kernel drop what it has of the shards: pages that another process has read count for that one's limit, not for ours."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def limited(count: int | None) -> Iterator[Callable[[], None] | None]:
    """What a child process calls to live under a memory limit."""
    if count is None:
        yield None
        return
    old = Path("/sys/fs/cgroup/memory")
    root = old if old.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"zotune-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if root is old else "memory.max")).write_text(str(count))
        yield lambda: (group / "cgroup.procs").write_text("0") and None  # type: ignore[func-returns-value]
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.2)


def child(what: str, args: argparse.Namespace, limit: int | None, **changes: Any) -> dict[str, Any] | None:
    options = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "length": args.length,
        "interval": args.interval,
        "scratch": args.scratch,
    }
    words = [sys.executable, __file__, what, str(args.model)]
    words += [word for name, value in (options | changes).items() if value is not None for word in (f"--{name}", str(value))]
    forget(args.model)
    with limited(limit) as enter:
        done = subprocess.run(words, stdout=subprocess.PIPE, preexec_fn=enter, check=False)
    if done.returncode:
        print(f"{what}: ended with {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.decode().splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    weights = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    limit = weights // 4
    found: dict[str, Any] = {"weights": weights, "limit": limit, "bandwidth": child("bandwidth", args, limit)}
    found["accelerate"] = child("accelerate", args, limit)
    for scheme in ("lozo", "lora"):
        found[scheme] = {what: child(what, args, limit if what == "disk" else None, scheme=scheme) for what in ("disk", "memory")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "compare", "disk", "memory", "accelerate", "bandwidth"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, default=33)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--scheme", choices=["lozo", "lora"], default="lozo")
    parser.add_argument("--scratch", help="folder for scratch files")
    args = parser.parse_args()
    if args.what == "make":
        make(args.model, args.layers)
        return
    work = {"compare": compare, "disk": train, "memory": train, "accelerate": accelerate, "bandwidth": bandwidth}[args.what]
    print(json.dumps(work(args)))


if __name__ == "__main__":
    main()
