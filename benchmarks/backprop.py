"""Rows of the learning tables that go backward: AdamW on all weights or on some, one block after the other, and fused with the backward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zotune.baselines import FirstOrder

#: Output projections, which write to the residual stream; lozo-g's check accepts these in a Llama and nothing else.
OUTPUTS = re.compile(r"\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.weight$")
BLOCKS = re.compile(r"\.(\d+)\.")
#: Name of a row and what it trains.
ROWS = {
    "fo-adamw": "what the scheme trains",
    "fo-adamw, guided layers": "the output projections of all layers",
    "fo-adamw, last layer": "the output projections of the last layer",
}
#: More rows, of ``frontier.py``.
CHEAP = {
    "fo-adamw, last block": "all weights of the last block and the last norm",
    "badam": "one block at a time, by AdamW (2404.02827)",
    "adalomo": "all weights, each as soon as its gradient is there (2310.10195)",
}
#: Every row that goes backward.
BACKWARD = {**ROWS, **CHEAP}
#: Steps that BAdam stays with a block. Its paper has 50 to 100, of thousands of steps.
STAY = 4


def optimizer(model: nn.Module, row: str, lr: float, seed: int) -> Any:
    """The optimizer of a row; a backward pass counts as two forward passes."""
    if row == "adalomo":
        return Fused(model, lr)
    if row == "badam":
        return BlockAdam(model, lr, seed)
    if row in ("fo-adamw, guided layers", "fo-adamw, last layer"):
        found = {name: int(match[1]) for name, _ in model.named_parameters() if (match := OUTPUTS.search(name))}
        last = max(found.values())
        train_only(model, [name for name, block in found.items() if row == "fo-adamw, guided layers" or block == last])
    if row == "fo-adamw, last block":
        train_only(model, last_block(model))
    return FirstOrder(model, "fo-adamw", lr=lr, seed=seed)


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def blocks(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each block, from the first to the last."""
    found: dict[int, list[str]] = {}
    for name, _ in model.named_parameters():
        if match := BLOCKS.search(name):
            found.setdefault(int(match[1]), []).append(name)
    return [found[number] for number in sorted(found)]


def last_block(model: nn.Module) -> list[str]:
    """Names of what is computed after the second-to-last block but for the head, which is tied to the embedding in small models."""
    norms = [name for name, p in model.named_parameters() if p.dim() == 1 and not BLOCKS.search(name)]
    return [*blocks(model)[-1], *norms]


class Counted(torch.optim.Optimizer):
    """Steps of backprop under the interface of :class:`zotune.ZerothOrder`, with its counts."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self.model, self.forward_passes, self.sequences_evaluated = model, 0, 0

    def step(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:  # type: ignore[override]
        self.model.train()
        losses = loss_fn(batch)
        self.descend(losses.mean())
        self.model.eval()
        self.forward_passes += 3
        self.sequences_evaluated += 3 * losses.numel()
        return losses.detach().mean()

    def descend(self, loss: Tensor) -> None:
        raise NotImplementedError


class Fused(Counted):
    """AdaLomo: the update of a weight happens within the backward pass, so that no two gradients are alive at a time."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        from pytorch_optimizer import AdaLOMO

        super().__init__(model, lr)
        self.inner = AdaLOMO(model, lr=lr)

    def descend(self, loss: Tensor) -> None:
        self.inner.fused_backward(loss, self.param_groups[0]["lr"])


class BlockAdam(Counted):
    """BAdam: AdamW on one block, moments and gradients of that block alone, then the next in random order."""

    def __init__(self, model: nn.Module, lr: float, seed: int) -> None:
        super().__init__(model, lr)
        self.blocks, self.random, self.taken = blocks(model), torch.Generator().manual_seed(seed), 0
        self.order = self._order()
        self.inner: torch.optim.AdamW | None = None

    def _order(self) -> Iterator[list[str]]:
        while True:
            for place in torch.randperm(len(self.blocks), generator=self.random).tolist():
                yield self.blocks[place]

    def step(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:  # type: ignore[override]
        if self.taken % STAY == 0:
            names = set(next(self.order))
            train_only(self.model, names)
            self.inner = torch.optim.AdamW([p for name, p in self.model.named_parameters() if name in names], weight_decay=0.0)
        self.taken += 1
        return super().step(loss_fn, batch)

    def descend(self, loss: Tensor) -> None:
        assert self.inner is not None
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        loss.backward()
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
