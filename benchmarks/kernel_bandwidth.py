"""What the kernels of full-space steps move per second, beside a copy on the same device.

    python benchmarks/kernel_bandwidth.py --numel 268435456

Needs a CUDA device and triton; says so and does nothing where there is none. A copy of n numbers reads and writes each once; so does
``perturb`` in float32, which makes the direction on the way. In bfloat16 with residuals the 16 bits beside a weight are read too, and
``update`` writes them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from zotune.kernels import perturb_kernels
from zotune.rng.directions import Directions, Key


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(3):
        work()
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def rows(numel: int, dtype: torch.dtype, kind: str, repeats: int, joined: bool) -> list[tuple[str, float]]:
    """(what, bytes a second) of a copy, a perturbation and an update of ``numel`` weights."""
    device = torch.device("cuda")
    weight, out = torch.randn(numel, device=device).to(dtype), torch.empty(numel, dtype=dtype, device=device)
    residual = torch.zeros(numel, dtype=torch.int16, device=device) if joined else None
    kernel = perturb_kernels(weight)
    if kernel is None:
        raise SystemExit("triton is not installed, so there is no kernel to measure.")
    directions, key, size = Directions(kind), Key(0, 0, 0, "weight"), weight.element_size()
    beside = 0 if residual is None else 2
    found = [("copy", 2 * size * numel / seconds(lambda: out.copy_(weight), repeats))]
    perturb = seconds(lambda: kernel.perturb(directions, key, 1e-3, weight, residual, out), repeats)
    update = seconds(lambda: kernel.update(directions, key, 1e-9, weight, residual, 1.0, key._replace(purpose="rounding")), repeats)
    found.append((f"perturb, {kind}", (2 * size + beside) * numel / perturb))
    found.append((f"update, {kind}", (2 * size + 2 * beside) * numel / update))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 28)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured.")
        return
    print("| dtype | what | GB/s | of a copy |\n|---|---|---|---|")
    for dtype, joined in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        stored = str(dtype).removeprefix("torch.") + (", residual" if joined else "")
        for kind in ("gaussian", "rademacher"):
            found = rows(args.numel, dtype, kind, args.repeats, joined)
            for what, rate in found:
                print(f"| {stored} | {what} | {rate / 1e9:.0f} | {rate / found[0][1]:.2f} |")


if __name__ == "__main__":
    main()
