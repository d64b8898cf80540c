"""Per-example losses of a batch: language-model loss, choice scoring, accuracy, classification.

A batch is a mapping of tensors with the examples along dimension 0 and a loss has shape (B,), so k stacked copies of a batch give k * B
losses. Only hidden states that predict a scored token go through the language-model head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.io.execution import current
from zotune.io.memory_tags import tagged
from zotune.objectives import output_gradients, packed_choices
from zotune.objectives.contrastive import ContrastiveLoss, SimilarityLoss
from zotune.objectives.image_text import ImageTextLoss
from zotune.objectives.output_gradients import recorded
from zotune.objectives.router_balance import balance_losses, recorded_router_logits
from zotune.objectives.seq2seq import Seq2SeqLoss
from zotune.objectives.tail_gradients import example_losses
from zotune.objectives.token_classes import TokenClassLoss
from zotune.objectives.token_logprobs import IGNORE, at_least_float32, cross_entropy, logits_of, scored_logits, token_logprobs
from zotune.weights.structure import head_of, text_config

Batch = Mapping[str, Tensor]


@dataclass
class LanguageModelLoss:
    """Mean negative log-likelihood in nats of each example's scored tokens, ``loss(batch) -> (B,)``.

    Of a mixture of experts with ``config.output_router_logits`` each example's load-balancing loss is added, as in the model's own loss.
    The batch holds input_ids (B, T), attention_mask (B, T), positions (B, S) and targets (B, S); with weights (B,) each example's loss is
    multiplied by its own.
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        targets = batch["targets"]
        scored = (targets != IGNORE).sum(dim=1).clamp(min=1)
        inputs = batch["input_ids"], batch["attention_mask"], batch["positions"], targets
        shares = batch["weights"] / scored if "weights" in batch else 1 / scored
        with recorded_router_logits(self.model) as routers:
            losses = -token_logprobs(self.model, *inputs, shares=shares).sum(dim=1) / scored
            losses = recorded(losses * batch["weights"] if "weights" in batch else losses)
        return sum((balance_losses(self.model, each, batch["attention_mask"]) for each in routers), losses)


@tagged("activations")
def choice_scores(model: nn.Module, batch: Batch, length_normalize: bool = False, *, answers: Tensor | None = None) -> Tensor:
    """Log-likelihood of each answer option given its prompt, summed over the option's tokens: (B, C) in float32.

    Args:
        model: a causal language model.
        batch: one row an example, where every option is a single token (input_ids (B, T), attention_mask,
            positions (B, 1), option_ids (B, C)); or one row an example that holds the prompt once and all options (see
            :func:`zotune.objectives.packed_choices.option_logprobs`) with option_mask (B, C); or one row an option (input_ids
            (B, C, T), attention_mask, positions (B, C, S), targets (B, C, S), option_mask (B, C)). Options outside the
            mask score -inf.
        length_normalize: divide each score by the option's number of tokens. A batch with option_lengths (B, C) is always normalized.
        answers: (B,), of a :class:`ChoiceLoss`: with single-token options an active recorder gets the output gradients.
    """
    if "option_ids" in batch:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = at_least_float32(_logits_of_options(model, inputs, batch, answers))
        return logits.gather(1, batch["option_ids"]) - logits.logsumexp(dim=1, keepdim=True)
    targets = batch["targets"]
    if packed_choices.is_packed(batch):
        logprobs = packed_choices.option_logprobs(model, batch)
    else:
        rows = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "positions", "targets"))
        logprobs = token_logprobs(model, *rows).view(targets.shape)
    scores = logprobs.sum(dim=2)
    if "option_lengths" in batch:
        scores = scores / batch["option_lengths"]
    elif length_normalize:
        scores = scores / (targets != IGNORE).sum(dim=2).clamp(min=1)
    return scores.masked_fill(~batch["option_mask"], float("-inf"))


@dataclass
class ChoiceLoss:
    """Cross-entropy in nats of the right answer under the softmax of the options' scores, ``loss(batch) -> (B,)``.

    The batch is one of :func:`choice_scores`, with ``answer`` (B,), the index of the right option.
    """

    model: nn.Module
    length_normalize: bool = False
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        scores = choice_scores(self.model, batch, self.length_normalize, answers=batch["answer"])
        return recorded(F.cross_entropy(scores, batch["answer"], reduction="none"))


@dataclass
class MaskedLanguageModelLoss:
    """Cross-entropy in nats of the right label word under the softmax of the label words' logits at a mask, ``loss(batch) -> (B,)``.

    As in LM-BFF (2012.15723). The batch holds input_ids (B, T), attention_mask (B, T), positions (B, 1) of the masks, option_ids (B, C),
    the label words' tokens, and answer (B,).
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        logits = label_word_logits(self.model, batch, answers=batch["answer"])
        return recorded(F.cross_entropy(logits, batch["answer"], reduction="none"))


@tagged("activations")
def label_word_logits(model: nn.Module, batch: Batch, *, answers: Tensor | None = None) -> Tensor:
    """Logits of the label words at the mask, (B, C) in float32, of a batch of :class:`MaskedLanguageModelLoss`.

    ``answers``: (B,), of such a loss: an active recorder gets the output gradients.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return at_least_float32(_logits_of_options(model, inputs, batch, answers).gather(1, batch["option_ids"]))


@tagged("activations")
def _logits_of_options(model: nn.Module, inputs: Batch, batch: Batch, answers: Tensor | None) -> Tensor:
    """Logits (B, vocabulary) at the one scored position; with ``answers`` an active recorder gets the output gradients."""
    recorder = output_gradients.active_recorder() if answers is not None else None
    if recorder is not None:
        recorder.begin(batch["positions"], torch.ones_like(batch["positions"], dtype=torch.bool), batch["attention_mask"])
    logits = scored_logits(model, inputs, batch["positions"])[:, 0]
    if recorder is not None and answers is not None:
        recorder.end_options(at_least_float32(logits), batch["option_ids"], answers, head_of(model))
    return logits


@dataclass
class AccuracyLoss:
    """1 − accuracy: 0 where the best score is a right option's, else 1, ``loss(batch) -> (B,)``; NaN where a score is.

    It has no gradient: it is constant between the points where two options' scores cross. The batch is one of :func:`choice_scores`, with
    ``answer`` (B,), the index of the right option, or ``right`` (B, C), 1 for every right one.
    """

    model: nn.Module
    length_normalize: bool = False
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        scores = choice_scores(self.model, batch, self.length_normalize)
        right = batch["right"] if "right" in batch else F.one_hot(batch["answer"], scores.shape[1])
        wrong = 1 - right.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return wrong.to(scores.dtype).masked_fill(scores.isnan().any(dim=1), torch.nan)

    def proxy(self, batch: Batch) -> Tensor:
        """The cross-entropy of the options, (B,), which varies smoothly where the accuracy jumps: evaluations are compared by it."""
        return ChoiceLoss(self.model, self.length_normalize)(batch)


@dataclass
class ClassifierLoss:
    """The loss of a sequence-classification head, ``loss(batch) -> (B,)``, of the kind that transformers takes.

    One output, or ``config.problem_type`` "regression": the mean square of scores − labels. Labels of numbers with a point for several
    outputs, or "multi_label_classification": the mean over outputs of their binary cross-entropy in nats. Else cross-entropy in nats.

    The batch holds input_ids (B, T), attention_mask (B, T), token_type_ids (B, T) where the model has them, and labels: (B,) for classes,
    (B,) or (B, C) for a regression with C outputs, (B, C) for several labels an example.

    Raises:
        ValueError: the labels do not fit the outputs.
    """

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        return example_losses(self.model, batch, lambda rows: head_losses(self.model, class_scores(self.model, rows), rows["labels"]))


@dataclass
class MediaLoss:
    """The same of a head for images or sound, ``loss(batch) -> (B,)``: the batch holds what the model takes, and labels."""

    model: nn.Module
    capturable = True

    @tagged("activations")
    def __call__(self, batch: Batch) -> Tensor:
        return example_losses(self.model, batch, lambda rows: head_losses(self.model, media_scores(self.model, rows), rows["labels"]))


_FIXES = {
    "regression": "give each example one number, or load the model with as many num_labels as numbers",
    "multi_label_classification": "give each example one 0.0 or 1.0 for every output",
    "single_label_classification": "give each example one whole number, or load the model with num_labels=1 for a regression",
}


@tagged("activations")
def head_losses(model: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
    """Losses (B,) of a classifier's outputs (B, C) in float32; see :class:`ClassifierLoss`."""
    kind = problem_of(model, scores.shape[1], labels)
    if kind != "single_label_classification":
        values = labels.view(len(labels), -1)
        if values.shape != scores.shape:
            raise ValueError(f"the model has {scores.shape[1]} outputs, and the labels have shape {tuple(labels.shape)}: {_FIXES[kind]}.")
        values = values.to(scores.dtype)
        errors = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        return errors(scores, values, reduction="none").mean(dim=1)
    labels = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    if labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels of {labels.dtype} and shape {tuple(labels.shape)} are no classes: {_FIXES[kind]}.")
    if current().has_values and labels.device.type == "cpu" and bool((labels.ge(scores.shape[1]) | labels.lt(0) & labels.ne(IGNORE)).any()):
        raise ValueError(
            f"a label lies outside of the model's {scores.shape[1]} classes: load the model with num_labels={_classes(labels)}."
        )
    return cross_entropy(scores, labels)


def problem_of(model: nn.Module, outputs: int, labels: Tensor) -> str:
    """The problem of a sequence-classification head, as transformers names it: by the config, else by its outputs and labels."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind is not None:
        return kind
    if outputs == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _classes(labels: Tensor) -> str:
    return str(int(labels.max()) + 1)


@tagged("activations")
def class_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, number of classes) of a sequence-classification model, in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return at_least_float32(logits_of(model(**padded_for(model, inputs))))


@tagged("activations")
def media_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, number of classes) of a model that classifies images or sound, in float32."""
    return at_least_float32(logits_of(model(**{name: value for name, value in batch.items() if name != "labels"})))


@tagged("temporary")
def padded_for(model: nn.Module, inputs: Batch) -> Batch:
    """The inputs with the model's own padding id where the attention mask is 0.

    A decoder with a classification head scores the last token that is not ``config.pad_token_id``. With another id behind a text, its
    score would depend on the length of the batch.
    """
    ids, mask, config = inputs.get("input_ids"), inputs.get("attention_mask"), getattr(model, "config", None)
    padding = getattr(text_config(config), "pad_token_id", None)
    if padding is None or ids is None or mask is None or ids.shape != mask.shape:
        return inputs
    return {**inputs, "input_ids": ids.masked_fill(mask == 0, padding)}


_OBJECTIVES: dict[str, Callable[[nn.Module], Callable[[Batch], Tensor]]] = {
    "lm": LanguageModelLoss,
    "choices": ChoiceLoss,
    "accuracy": AccuracyLoss,
    "classifier": ClassifierLoss,
    "mlm": MaskedLanguageModelLoss,
    "generation": LanguageModelLoss,
    "seq2seq": Seq2SeqLoss,
    "token-classes": TokenClassLoss,
    "contrastive": ContrastiveLoss,
    "similarity": SimilarityLoss,
    "image-text": ImageTextLoss,
    "media": MediaLoss,
}


def objective(name: str, model: nn.Module) -> Callable[[Batch], Tensor]:
    """The loss function of a name: ``"lm"``, ``"choices"``, ``"accuracy"``, ``"classifier"``, ``"mlm"`` (label words at a mask),
    ``"generation"`` (of the right answer), ``"seq2seq"``, ``"token-classes"``, ``"contrastive"``, ``"similarity"``, ``"image-text"`` or
    ``"media"`` (classes of images or sound).

    Raises:
        ValueError: for any other name.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose one of {', '.join(_OBJECTIVES)}.")
    return _OBJECTIVES[name](model)
