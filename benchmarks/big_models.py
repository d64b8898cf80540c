"""The table of docs/how-to/big_models.md: the memory of OPT's sizes with offloaded blocks. Predicted, nothing is run.

One row was measured, with benchmarks/offload.py, and says so.

    python benchmarks/big_models.py

A card holds its context, what always stays (embeddings, norms, biases), two blocks, and 15% on top for activations and the allocator; the
rest is in host memory, or on disk. A pass over the weights takes their bytes over the link's rate.
"""

from __future__ import annotations

import torch

from zotune.weights.offload import budget

#: Width, layers, heads; OPT's own, 175B as published.
SIZES = {
    "1.3B": (2048, 24, 32),
    "2.7B": (2560, 32, 32),
    "6.7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (7168, 48, 56),
    "66B": (9216, 64, 72),
    "175B": (12288, 96, 96),
}
#: Of the published table for MeZO in full space, GB.
ZO2 = {"1.3B": 3.75, "2.7B": 4.14, "6.7B": 4.99, "13B": 6.18, "30B": 8.86, "66B": 12.07, "175B": 18.04}
#: Bytes a second: PCIe 4 with 16 lanes as it is seen, and a fast solid-state disk.
PCIE, DISK = 25e9, 5e9
#: The model of benchmarks/offload.py on a CPU, from a disk of 2.1 GB/s: weights, peak of the memory cgroup (which counts Python), time of
#: reading the blocks once.
MEASURED = ["**2.3B Llama-like, measured on a CPU**", "4.6", "–", "**0.9**", "–", "–", "4", "–", "**2.1 s**"]


def row(size: str) -> list[str]:
    from transformers import OPTConfig, OPTForCausalLM

    width, layers, heads = SIZES[size]
    config = OPTConfig(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    whole, base, block, count = budget.sizes(model)
    bits = [(base + 2 * block * share + budget.CONTEXT) / (1 - budget.SPARE) / 1e9 for share in (1, 0.5)]
    away = count * block
    return [
        size, f"{whole / 1e9:.1f}", f"{whole / 1e9 + budget.CONTEXT / 1e9:.1f}", f"{bits[0]:.1f}", f"{bits[1]:.1f}",
        f"{ZO2[size]:g}", f"{away / 1e9:.0f}",
        f"{away / PCIE:.1f} s", f"{away / DISK:.0f} s",
    ]  # fmt: skip


HEAD = [
    "OPT", "weights", "GPU, all resident", "GPU, offloaded", "GPU, int8, offloaded", "GPU, ZO2", "host or disk", "a pass from host",
    "a pass from disk",
]  # fmt: skip


def table() -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row(size) for size in SIZES), MEASURED]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
