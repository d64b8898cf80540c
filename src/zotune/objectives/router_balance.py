"""The load-balancing loss of a mixture of experts, for each example (2101.03961; by sequence as in 2412.19437).

With f_e the share of an example's tokens that go to expert e, and P_e the mean probability that the router gives it, over all layers,

    balance = E Σ_e f_e P_e.

Models of transformers add ``router_aux_loss_coef`` times that of a batch to their own loss where ``config.output_router_logits`` is set. Of
one example alone it is the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.io.memory_tags import tagged


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Any]]:
    """Within the block, the router's logits of each forward of a model that is configured to return them; else none."""
    found: list[Any] = []
    if not coefficient(model):
        yield found
        return

    def record(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "router_logits", None)
        if logits:
            found.append(logits)

    handle = model.register_forward_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def coefficient(model: nn.Module) -> float:
    """The factor of the load-balancing loss in the model's own loss; 0 where it has none."""
    config = getattr(model, "config", None)
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if getattr(config, "output_router_logits", False) else 0.0


@tagged("activations")
def balance_losses(model: nn.Module, router_logits: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """:func:`coefficient` times the load-balancing loss of each example, (R,), float32.

    Args:
        model: says how many experts a token has.
        router_logits: of each layer, (R · T, E).
        attention_mask: 1 for real tokens, 0 for padding, (R, T).
    """
    rows = len(attention_mask)
    logits = torch.stack([layer.to(attention_mask.device) for layer in router_logits]).float()
    probabilities = logits.view(len(router_logits), rows, -1, logits.shape[-1]).softmax(dim=-1)
    mask = F.pad(attention_mask, (probabilities.shape[2] - attention_mask.shape[1], 0), value=1).float()  # after a soft prompt
    share = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(router_logits))
    config: Any = model.config
    chosen = probabilities.topk(getattr(config, "num_experts_per_tok", 1), dim=-1).indices
    counts = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)
    used, given = (torch.einsum("lrte,rt->re", each, share) for each in (counts, probabilities))
    return coefficient(model) * probabilities.shape[-1] * (used * given).sum(dim=1)
