"""OPT-13B and OPT-30B shapes on a card with room for a fraction of them: tokens a second, peak memory, how busy the link is.

    python benchmarks/offload_gpu.py --model opt-13b --cap 8GiB --batch_size 16 --length 256
    python benchmarks/offload_gpu.py --model opt-30b --cap 10GiB --batch_size 16 --length 256

Needs a CUDA device and host memory for the weights; says so and does nothing where there is none. Weights are random, in bfloat16. Rows:
LOZO, MeZO on LoRA and MeZO in full space with blocks in host memory under the cap (the allocator is held to it); the same without offload,
where the card has room; one forward of the same rows by accelerate's cpu_offload. ZO2 publishes 6.18 GB for OPT-13B and 8.86 GB for
OPT-30B (MeZO in full space).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from zotune import ZerothOrder, methods
from zotune.io.sizes import parse_size
from zotune.weights.offload import offload

SHAPES = {"opt-1.3b": (2048, 24, 32), "opt-13b": (5120, 40, 40), "opt-30b": (7168, 48, 56), "opt-tiny": (64, 4, 4)}


def model_of(name: str) -> torch.nn.Module:
    """The shape with random weights, in host memory."""
    from transformers import OPTConfig, OPTForCausalLM

    width, layers, heads = SHAPES[name]
    config = OPTConfig(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                for rows in parameter.split(1024):
                    rows.copy_(torch.randn(rows.shape, generator=generator).mul_(0.02))
            else:
                parameter.fill_(0.0)
        for parameter in (p for n, p in model.named_parameters() if "norm" in n and n.endswith("weight")):
            parameter.fill_(1.0)
    return model.eval()


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def measured(work: Callable[[], Any], steps: int, tokens: int) -> dict[str, float]:
    """Seconds a call (the median), tokens of the batch a second and the peak of the card's memory."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    middle = sorted(seconds)[len(seconds) // 2]
    return {"seconds": middle, "tokens_per_second": tokens / middle, "peak_gib": torch.cuda.max_memory_reserved() / 2**30}


def link() -> float:
    """Bytes a second from pinned host memory."""
    host, there = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    there.copy_(host)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(4):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * (1 << 30) / (time.perf_counter() - begin)


def loss_of(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def losses(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, logits_to_keep=2).logits.float()
        return torch.nn.functional.cross_entropy(logits[:, 0], ids[:, -1], reduction="none")

    return losses


def row(args: argparse.Namespace, what: str, ids: torch.Tensor) -> dict[str, Any]:
    """One contender, from loading to figures."""
    model = model_of(args.model)
    stream = None
    if "offload" in what:
        stream = offload(model, "cpu", device="cuda", max_memory=parse_size(args.cap))
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_size(args.cap) / total))
    elif what == "accelerate":
        from accelerate import cpu_offload

        cpu_offload(model, "cuda")
        stacked, loss = ids.repeat(2, 1), loss_of(model)
        with torch.no_grad():
            return measured(lambda: loss(stacked), args.steps, ids.numel())
    else:
        model.cuda()
    if "lora" in what:
        model = with_lora(model)
    method = methods.lozo(interval=50, eps=1e-3) if "lozo" in what else methods.mezo(eps=1e-3)
    optimizer = ZerothOrder(model, method, lr=1e-6, seed=0, forward_batching="sequential" if what.startswith("mezo ") else "batched")
    loss = loss_of(model)
    optimizer.step(loss, ids)
    before = None if stream is None else stream.traffic.bytes
    found = measured(lambda: optimizer.step(loss, ids), args.steps, ids.numel())
    if stream is not None:
        moved = (stream.traffic.bytes - before) / (args.steps + 1)
        found |= {"gib_a_step": moved / 2**30, "link_used": moved / found["seconds"] / args.link, "blocks_away": len(stream.blocks)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="opt-13b")
    parser.add_argument("--cap", default="8GiB")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured.")
        return
    args.link = link()
    print(json.dumps({"device": torch.cuda.get_device_name(), "link_bytes_per_second": args.link, **vars(args)}))
    ids = torch.randint(0, 50000, (args.batch_size, args.length), generator=torch.Generator().manual_seed(1)).cuda()
    for what in ("lozo offload", "mezo lora offload", "mezo offload", "accelerate", "lozo"):
        try:
            print(json.dumps({"what": what, **row(args, what, ids)}), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({"what": what, "out_of_memory": str(error).splitlines()[0]}), flush=True)
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
