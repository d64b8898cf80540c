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

#: The C that cross-validation chooses from.
INVERSE_PENALTIES = tuple(10 ** (-4 + 8 * step / 9) for step in range(10))


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
    weight, bias = _minimum((features - mean) / deviation, answers, classes, l2, intercept=True)
    return LinearProbe(weight, bias, mean, deviation)


def fit_by_folds(features: Tensor, answers: Tensor, classes: int, folds: int) -> LinearProbe:
    """The minimum of C Σ −log softmax(A h_i)[y_i] + ‖A‖² / 2, C of :data:`INVERSE_PENALTIES` by cross-validation; see :func:`fit`.

    The folds hold the classes in their proportions, in the order of the examples. The smallest C of the best mean accuracy is taken.

    Raises:
        ValueError: a class has fewer examples than there are folds.
    """
    features = features.double()
    counts = [int((answers == each).sum()) for each in range(classes)]
    if min(counts) < folds:
        raise ValueError(f"linear-probe: the rarest class has {min(counts)} training examples, fewer than folds={folds}: choose fewer.")
    fold = torch.empty_like(answers)
    for each, count in enumerate(counts):
        fold[answers == each] = torch.arange(count, device=answers.device) * folds // count
    scores = [0.0] * len(INVERSE_PENALTIES)
    for held in range(folds):
        seen, weight = fold != held, None
        for index, inverse in enumerate(INVERSE_PENALTIES):  # each fit starts from the last one's minimum
            weight = _minimum(features[seen], answers[seen], classes, 1 / (inverse * int(seen.sum())), start=weight, tolerance=1e-4)[0]
            scores[index] += float(((features[~seen] @ weight.T).argmax(dim=1) == answers[~seen]).double().mean())
    best = INVERSE_PENALTIES[max(range(len(scores)), key=scores.__getitem__)]
    weight, bias = _minimum(features, answers, classes, 1 / (best * len(features)))
    return LinearProbe(weight, bias, torch.zeros_like(features[0]), torch.ones_like(features[0]))


def _minimum(
    features: Tensor,
    answers: Tensor,
    classes: int,
    l2: float,
    *,
    intercept: bool = False,
    start: Tensor | None = None,
    tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """A and b of the least mean cross-entropy + λ ‖A‖² / 2, by L-BFGS in float64; b = 0 without an intercept."""
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device) if start is None else start.clone()
    weight.requires_grad_()
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=intercept)
    trained = [weight, bias] if intercept else [weight]
    optimizer = torch.optim.LBFGS(
        trained, max_iter=500, tolerance_grad=tolerance, tolerance_change=tolerance / 1000, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, answers) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


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
