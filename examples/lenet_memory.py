"""LeNet on MNIST: where training memory goes with AdamW, where with zeroth-order methods, and how the latter train it.

    python examples/lenet_memory.py --data_dir DIR --output_dir DIR [--epochs 3]

`--data_dir` holds the four files of MNIST (train-images-idx3-ubyte.gz, ...) from https://ossci-datasets.s3.amazonaws.com/mnist/.
Writes memory.json, memory.png and, with epochs, curves.json and curves.png; docs/explanation/results/lenet.md discusses them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zotune
from zotune.io.figures import new_figure, save_figure
from zotune.memory import Ledger

MEBIBYTE = 2**20
BATCH = 128
#: The textbook's figures, MB of 2²⁰ bytes.
PUBLISHED = {"parameters": 0.169, "gradients": 0.169, "activations": 2.292, "data": 0.384, "optimizer state": 0.339}
#: (method, learning rate): measured, ε too, and the largest tried that is steady for several epochs.
RATES: dict[str, float | str] = {"mezo": "auto", "zo-adamw": 1e-3, "zo-rmsprop": 1e-3}
NAMES = {"mezo": "ZO-SGD", "zo-adamw": "ZO-AdamW", "zo-rmsprop": "ZO-RMSProp"}


class LeNet(nn.Module):
    """LeNet-5 on 28 × 28 images without padding: 44,426 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def textbook(batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The textbook's account of one AdamW step: activations are the outputs of the layers that have weights, data images and labels."""
    torch.manual_seed(0)
    model = LeNet()
    optimizer = torch.optim.AdamW(model.parameters())
    outputs: list[Tensor] = []
    for layer in model.children():
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    parts = {
        "parameters": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "activations": outputs,
        "data": list(batch),
        "optimizer state": [value for state in optimizer.state.values() for value in state.values()],
    }
    return {name: size(tensors) / MEBIBYTE for name, tensors in parts.items()}


def at_peak(method: str, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What is alive at the peak of a real step, by kind."""
    torch.manual_seed(0)
    model = LeNet()
    with Ledger(model) as ledger:
        ledger.add(batch, "data")
        optimizer = optimizer_of(method, model)
        for _ in range(2):
            ledger.begin_step()
            optimizer.step(lambda each: F.cross_entropy(model(each[0]), each[1], reduction="none"), batch)
        split = ledger.peak()
    return {kind: count / MEBIBYTE for kind, count in split.kinds.items() if count}


def optimizer_of(method: str, model: nn.Module, lr: float | str = 1e-3) -> zotune.ZerothOrder | zotune.baselines.FirstOrder:
    if method in zotune.baselines.names():
        return zotune.baselines.FirstOrder(model, method, lr=float(lr))
    options = {"eps": "auto"} if lr == "auto" else {}
    return zotune.ZerothOrder(model, zotune.methods.get(method, **options), lr=lr)


# -- data and training ----------------------------------------------------------------------------------------------------------------


def mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images (N, 1, 28, 28) of mean 0 and deviation 1, labels (N,)) of "train" or "t10k"."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(folder / f"{split}-{name}-ubyte.gz") as file:
            return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)

    return read("images-idx3", 16).view(-1, 1, 28, 28).float().div_(255).sub_(0.1307).div_(0.3081), read("labels-idx1", 8).long()


def batches(data: tuple[Tensor, Tensor], epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(data[1]), generator=generator)
        for rows in order.split(BATCH)[: len(order) // BATCH]:
            yield data[0][rows], data[1][rows]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(dim=1) == data[1]).float().mean())


def train(method: str, lr: float | str, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = LeNet()
    optimizer = optimizer_of(method, model, lr)
    curve: dict[str, list[float]] = {"step": [], "loss": [], "accuracy": []}
    recent: list[float] = []
    for step, batch in enumerate(batches(data, epochs), start=1):
        recent.append(float(optimizer.step(lambda each: F.cross_entropy(model(each[0]), each[1], reduction="none"), batch)))
        if step % 100 == 0:
            for name, value in (("step", step), ("loss", sum(recent) / len(recent)), ("accuracy", accuracy(model, test))):
                curve[name].append(round(value, 4))
            recent.clear()
    optimizer.remove_hooks()
    return curve


# -- figures --------------------------------------------------------------------------------------------------------------------------


def draw_memory(book: dict[str, float], peaks: dict[str, dict[str, float]], path: Path) -> None:
    figure, ((left, right),) = new_figure(1, 2, (10, 3.8))
    bars = left.bar(list(book), list(book.values()), color="#4477aa")
    left.bar_label(bars, [f"{value:.3f}" for value in book.values()], fontsize=8)
    left.set(title=f"One AdamW step, batch {BATCH}", ylabel="MB (2²⁰ bytes)")
    left.tick_params(axis="x", labelrotation=20)
    kinds = sorted({kind for split in peaks.values() for kind in split})
    colors = {kind: f"C{index}" for index, kind in enumerate(kinds)}
    before = dict.fromkeys(peaks, 0.0)
    for kind in kinds:
        values = [split.get(kind, 0.0) for split in peaks.values()]
        right.bar([NAMES.get(m, m) for m in peaks], values, bottom=list(before.values()), label=kind, color=colors[kind])
        before = {m: before[m] + value for m, value in zip(peaks, values, strict=True)}
    right.set(title="All tensors alive at the peak of a step")
    right.set_ylim(0, max(before.values()) * 1.1)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def draw_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, (axes,) = new_figure(1, 2, (9, 3.5))
    for method, curve in curves.items():
        for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
            axis.plot(curve["step"], curve[name], label=f"{NAMES.get(method, method)}, lr {RATES[method]}")
    for axis, label in zip(axes, ("training loss, nats", "test accuracy"), strict=True):
        axis.set(xlabel="step", ylabel=label)
    axes[1].legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="LeNet on MNIST: memory by AdamW and by zeroth-order methods, and training curves.")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the four .gz files of MNIST")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data for the curves; 0: memory only")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = mnist(args.data_dir, "train")
    batch = data[0][:BATCH].clone(), data[1][:BATCH].clone()
    book = textbook(batch)
    for name, value in book.items():
        print(f"{name:<16}{value:7.3f} MB   published {PUBLISHED[name]:.3f}")
    peaks = {method: at_peak(method, batch) for method in ("fo-adamw", *RATES)}
    for method, split in peaks.items():
        parts = ", ".join(f"{kind} {value:.3f}" for kind, value in split.items())
        print(f"{NAMES.get(method, method):<12} peak {sum(split.values()):.3f} MB: {parts}")
    (args.output_dir / "memory.json").write_text(json.dumps({"textbook": book, "peaks": peaks}, indent=1) + "\n")
    draw_memory(book, peaks, args.output_dir / "memory.png")
    if args.epochs:
        test = mnist(args.data_dir, "t10k")
        curves = {}
        for method, lr in RATES.items():
            curves[method] = train(method, lr, data, test, args.epochs)
            print(f"{NAMES[method]:<12} test accuracy {curves[method]['accuracy'][-1]:.4f} after {args.epochs} epochs")
        (args.output_dir / "curves.json").write_text(json.dumps(curves) + "\n")
        draw_curves(curves, args.output_dir / "curves.png")


if __name__ == "__main__":
    main()
