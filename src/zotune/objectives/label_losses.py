"""The loss that a model computes of its labels, as one loss per example.

Models of transformers return the mean over a batch's items, which are tokens or examples:

    L = (1/N) Σ_b Σ_i ℓ_bi = (1/B) Σ_b ℓ_b   with   ℓ_b = (B/N) Σ_i ℓ_bi,

of B examples and N items. B and N are those of all micro-batches of a step, so that 2 micro-batches of 8 examples have the losses of one of
16, whether or not the model divides by a number of items that it is given. Which form a model's loss has is found by comparison
(:func:`find`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives.losses import head_losses
from zotune.objectives.output_gradients import recorded
from zotune.objectives.tail_gradients import example_losses
from zotune.objectives.token_logprobs import IGNORE, at_least_float32, logits_of, scored_logprobs
from zotune.weights.precision import HALF

Batch = Mapping[str, Tensor]

#: Keys that :meth:`LabelLoss.batches` adds: indices of the logits that are scored (B, S), their targets (B, S), and B / N (B,).
POSITIONS, TARGETS, WEIGHTS = "_positions", "_targets", "_weights"
#: Largest difference from the model's own loss that is rounding, relative to it.
ROUNDING, ROUNDING_HALF = 1e-4, 2e-3


@dataclass(frozen=True)
class LabelLoss:
    """The loss of labels, ``loss(batch) -> (B,)``, for a batch of :meth:`batches`.

    Args:
        model: a model of transformers.
        form: a name of :data:`FORMS`.
    """

    model: nn.Module
    form: str
    capturable = True

    @property
    def of_tokens(self) -> bool:
        """Whether a label is one of a token."""
        return self.form in ("next token", "token")

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        weights = batch[WEIGHTS]
        return recorded(weights * FORMS[self.form](self.model, {name: value for name, value in batch.items() if name != WEIGHTS}, weights))

    @tagged("temporary")
    def batches(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Micro-batches of a step, with what this loss needs in place of token labels, and B / N."""
        found = [self._with_places(batch) for batch in batches]
        examples = sum(len(batch["labels"]) for batch in batches)
        items = sum(int(_items(batch[TARGETS] if self.of_tokens else batch["labels"])) for batch in found)
        weight = examples / max(items, 1)
        return [{**batch, WEIGHTS: torch.full((len(batch["input_ids"]),), weight, device=batch["input_ids"].device)} for batch in found]

    def _with_places(self, batch: Batch) -> dict[str, Tensor]:
        if not self.of_tokens:
            return dict(batch)
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift(labels=labels)
        targets = labels[:, 1:] if self.form == "next token" else labels
        scored = targets != IGNORE
        most = max(int(scored.sum(dim=1).max()), 1)
        places = scored.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]  # those that are scored, in order
        kept = scored.gather(1, places)
        return {**inputs, POSITIONS: places * kept, TARGETS: targets.gather(1, places).masked_fill(~kept, IGNORE)}


def _items(labels: Tensor) -> Tensor | int:
    """What the mean is over: targets that are not -100; of numbers, examples."""
    return len(labels) if labels.is_floating_point() else (labels != IGNORE).sum()


def _logprobs(model: nn.Module, batch: Batch, shares: Tensor | None) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name not in (POSITIONS, TARGETS)}
    positions, targets, length, mask = batch[POSITIONS], batch[TARGETS], None, None
    if "decoder_input_ids" in inputs:
        length = inputs["decoder_input_ids"].shape[1]
        ends = positions.masked_fill(targets == IGNORE, -1).amax(dim=1, keepdim=True)
        mask = (torch.arange(length, device=positions.device) <= ends).long()  # what follows the last scored token may be padding
    return scored_logprobs(model, inputs, positions, targets, shares=shares, length=length, mask=mask)


def _next_token(model: nn.Module, batch: Batch, weights: Tensor) -> Tensor:
    return -_logprobs(model, batch, weights).sum(dim=1)


def _token(model: nn.Module, batch: Batch, weights: Tensor) -> Tensor:
    behind_encoder = "decoder_input_ids" in batch  # else no head of a language model: no output gradients
    return -_logprobs(model, batch, weights if behind_encoder else None).sum(dim=1)


def _example(model: nn.Module, batch: Batch, weights: Tensor) -> Tensor:
    def losses_of(rows: Batch) -> Tensor:
        inputs = {name: value for name, value in rows.items() if name != "labels"}
        return head_losses(model, at_least_float32(logits_of(model(**inputs))), rows["labels"])

    return example_losses(model, batch, losses_of)


#: The sum over an example's items of (model, batch, weights).
FORMS: dict[str, Callable[[nn.Module, Batch, Tensor], Tensor]] = {
    "next token": _next_token,  # causal language models
    "token": _token,  # masked language models, encoder-decoders, token classifiers
    "example": _example,  # classes, numbers or several labels
}


def find(model: nn.Module, batch: Batch) -> str | None:
    """The name of the form that gives the model's own loss of a batch; None where there is none (an auxiliary loss, another scale).

    The model is evaluated at its weights as they are; call it in evaluation mode, without gradients.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or "input_ids" not in batch or "shift_labels" in batch or labels.dim() not in (1, 2):
        return None
    output = model(**batch)
    own = output.get("loss") if isinstance(output, Mapping) else output[0]
    if not isinstance(own, Tensor) or own.dim() or not own.isfinite() or getattr(output, "aux_loss", None) is not None:
        return None
    half = any(p.dtype in HALF for p in model.parameters())
    for form in _candidates(labels):
        loss = LabelLoss(model, form)
        try:
            found = loss(loss.batches([batch])[0]).mean()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to inputs that are not for it
            continue
        if abs(float(found) - float(own)) <= (ROUNDING_HALF if half else ROUNDING) * (1e-3 + abs(float(own))):
            return form
    return None


def _candidates(labels: Tensor) -> tuple[str, ...]:
    return ("example",) if labels.dim() == 1 or labels.is_floating_point() else ("next token", "token", "example")
