"""A linear probe: logistic regression on what a frozen language model makes of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.objectives.token_logprobs import scored_logits
from zotune.weights.structure import head_of, module_mode


@dataclass(frozen=True)
class LinearProbe:
    """Scores A (h − μ) / σ + b of features h (N, d): weight A (C, d), bias b (C,), mean μ and deviation σ (d,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Log-probabilities of the classes, (N, C) in float32."""
        standard = (features.double() - self.mean) / self.deviation
        return (standard @ self.weight.T + self.bias).log_softmax(dim=1).float()


def fit(features: Tensor, answers: Tensor, classes: int, l2: float) -> LinearProbe:
    """The minimum of (1/N) Σ −log softmax(A h_i + b)[y_i] + λ ‖A‖² / 2 over standardized features, by L-BFGS in float64.

    Args:
        features: (N, d).
        answers: class of each, int64 (N,).
        classes: how many there are.
        l2: λ.
    """
    features = features.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-8)
    features = (features - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, answers) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, deviation)


@torch.no_grad()
def features_of(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]],
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """What the model's head is given at the end of each prompt, float32 (N, d).

    Args:
        model: a causal language model.
        examples: with ``prompt_ids``.
        collate: as :class:`zotune.tasks.LanguageModelCollator`, for completions.
        batch_size: prompts a forward.
        device: where the model is.

    Raises:
        ValueError: the model has no head that could be listened to.
    """
    head = head_of(model)
    if head is None:
        raise ValueError("linear-probe reads what a language model's head is given, and this model has no such head.")
    found: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: found.append(args[0][:, 0].float()))
    with handle, module_mode(model, training=False):
        for part in _parts(examples, batch_size):
            # A completion of one token: its position is the prompt's last one, and it is never fed.
            batch = collate([{"prompt_ids": example["prompt_ids"], "completion_ids": [0]} for example in part])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            scored_logits(model, inputs, batch["positions"].to(device))
    return torch.cat(found)


def _parts(examples: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))
