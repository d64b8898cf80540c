"""Per-example losses of a batch: language-model loss, choice scoring, classification.

Every batch is a mapping of tensors with the examples along dimension 0 and every loss has shape (B,), so a caller may
stack k copies of a batch and read k * B losses. Only the hidden states that predict a scored token go through the
language-model head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

#: Target value of a position that is not scored.
IGNORE = -100

# The float32 copy of the logits is made this many elements at a time (64 MiB), never for the whole batch at once.
_CHUNK_ELEMENTS = 2**24


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of the scored tokens: log p(targets[r, s] | input_ids[r, : positions[r, s] + 1]).

    Args:
        model: a causal language model whose output has ``logits`` (R, T, vocabulary) (or a tuple with them first).
        input_ids: token ids, (R, T).
        attention_mask: 1 for real tokens, 0 for padding, (R, T).
        positions: index along T of the hidden state that predicts each scored token, (R, S).
        targets: ids of the scored tokens, (R, S); -100 where there is none.

    Returns:
        Natural-log probabilities in float32 (float64 for a float64 model), (R, S); 0 where the target is -100.
    """
    logits = _scored_logits(model, input_ids, attention_mask, positions)
    return -_cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


@dataclass
class LanguageModelLoss:
    """Mean negative log-likelihood in nats of each example's scored tokens, ``loss(batch) -> (B,)``.

    The batch holds input_ids (B, T), attention_mask (B, T), positions (B, S) and targets (B, S).
    """

    model: nn.Module

    def __call__(self, batch: Batch) -> Tensor:
        targets = batch["targets"]
        logprobs = token_logprobs(self.model, batch["input_ids"], batch["attention_mask"], batch["positions"], targets)
        scored = (targets != IGNORE).sum(dim=1).clamp(min=1)
        return -logprobs.sum(dim=1) / scored


def choice_scores(model: nn.Module, batch: Batch, length_normalize: bool = False) -> Tensor:
    """Log-likelihood of each answer option given its prompt, summed over the option's tokens: (B, C) in float32.

    Args:
        model: a causal language model.
        batch: either one row an example, where every option is a single token (input_ids (B, T), attention_mask,
            positions (B, 1), option_ids (B, C)), or one row an option (input_ids (B, C, T), attention_mask,
            positions (B, C, S), targets (B, C, S), option_mask (B, C)). Options outside the mask score -inf.
        length_normalize: divide each score by the option's number of tokens.
    """
    if "option_ids" in batch:
        logits = _scored_logits(model, batch["input_ids"], batch["attention_mask"], batch["positions"])[:, 0]
        logits = _at_least_float32(logits)
        return logits.gather(1, batch["option_ids"]) - logits.logsumexp(dim=1, keepdim=True)
    targets = batch["targets"]
    logprobs = token_logprobs(
        model,
        batch["input_ids"].flatten(0, 1),
        batch["attention_mask"].flatten(0, 1),
        batch["positions"].flatten(0, 1),
        targets.flatten(0, 1),
    ).view(targets.shape)
    scores = logprobs.sum(dim=2)
    if length_normalize:
        scores = scores / (targets != IGNORE).sum(dim=2).clamp(min=1)
    return scores.masked_fill(~batch["option_mask"], float("-inf"))


@dataclass
class ChoiceLoss:
    """Cross-entropy in nats of the right answer under the softmax of the options' scores, ``loss(batch) -> (B,)``.

    The batch is one that :func:`choice_scores` takes, with ``answer`` (B,), the index of the right option.
    """

    model: nn.Module
    length_normalize: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        scores = choice_scores(self.model, batch, self.length_normalize)
        return F.cross_entropy(scores, batch["answer"], reduction="none")


@dataclass
class ClassifierLoss:
    """Cross-entropy in nats of a sequence-classification head, ``loss(batch) -> (B,)``.

    The batch holds input_ids (B, T), attention_mask (B, T), token_type_ids (B, T) where the model has them, and
    labels (B,).
    """

    model: nn.Module

    def __call__(self, batch: Batch) -> Tensor:
        return _cross_entropy(class_scores(self.model, batch), batch["labels"])


def class_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, number of classes) of a sequence-classification model, in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return _at_least_float32(_logits_of(model(**inputs)))


_OBJECTIVES: dict[str, Callable[[nn.Module], Callable[[Batch], Tensor]]] = {
    "lm": LanguageModelLoss,
    "choices": ChoiceLoss,
    "classifier": ClassifierLoss,
}


def objective(name: str, model: nn.Module) -> Callable[[Batch], Tensor]:
    """The loss function of a name: ``"lm"``, ``"choices"`` or ``"classifier"``.

    Raises:
        ValueError: for any other name.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose one of {', '.join(_OBJECTIVES)}.")
    return _OBJECTIVES[name](model)


def _scored_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits (R, S, vocabulary) at `positions`, as the model's own forward makes them."""
    arguments: dict[str, Tensor | bool] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if _takes(model, "use_cache"):
        arguments["use_cache"] = False
    with _gather_before_head(model, positions, input_ids.shape) as gathered:
        logits = _logits_of(model(**arguments))
    if not gathered:
        logits = _select(logits, positions)
    return logits


@contextmanager
def _gather_before_head(model: nn.Module, positions: Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """For the length of the block the head sees only the hidden states at `positions`.

    Yields a list that is non-empty once the head was given gathered states. What the model does to the logits after
    its head (soft-capping, scaling) is its own code and acts on the gathered ones.
    """
    gathered: list[bool] = []
    head = _head(model)
    if head is None:
        yield gathered
        return

    def gather(_module: nn.Module, args: tuple) -> tuple | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None  # a head that is fed something else: the logits are gathered afterwards instead
        gathered.append(True)
        return (_select(args[0], positions), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None:
        return None
    head = get_head()
    # A head that is the input embedding itself is called with token ids: not a place to gather at.
    return head if isinstance(head, nn.Module) and not isinstance(head, nn.Embedding) else None


def _select(states: Tensor, positions: Tensor) -> Tensor:
    """(R, T, d) at positions (R, S) -> (R, S, d)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, positions]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[targets] in float32, 0 where the target is -100: (N, V), (N,) -> (N,)."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    chunks = [
        F.cross_entropy(_at_least_float32(part), target, reduction="none", ignore_index=IGNORE)
        for part, target in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits_of(output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__} without logits: load it with its head, e.g. "
            "AutoModelForCausalLM or AutoModelForSequenceClassification."
        )
    return logits


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
