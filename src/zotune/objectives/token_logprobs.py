"""Log-probabilities of scored tokens: a causal language model's forward whose head computes scored positions only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.io.memory_tags import tagged
from zotune.objectives import output_gradients
from zotune.objectives.final_norm import observing_norm
from zotune.objectives.head_transform import HeadTransform, observing_transform
from zotune.weights.structure import head_of

#: Target value of a position that is not scored.
IGNORE = -100

# Elements of the logits that are converted to float32 at a time (64 MiB), never of a whole batch.
CHUNK_ELEMENTS = 2**24


def token_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor, *, shares: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the scored tokens: log p(targets[r, s] | input_ids[r, : positions[r, s] + 1]).

    Args:
        model: a causal language model whose output has ``logits`` (R, T, vocabulary) (or a tuple with them first).
        input_ids: token ids, (R, T).
        attention_mask: 1 for real tokens, 0 for padding, (R, T).
        positions: index along T of the hidden state that predicts each scored token, (R, S).
        targets: ids of the scored tokens, (R, S); -100 where there is none.
        shares: (R,), of losses −shares[r] Σ_s of these log-probabilities: an active recorder gets the output gradients.

    Returns:
        Natural-log probabilities in float32 (float64 for a float64 model), (R, S); 0 where the target is -100.
    """
    return scored_logprobs(model, {"input_ids": input_ids, "attention_mask": attention_mask}, positions, targets, shares=shares)


@tagged("logits")
def scored_logprobs(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    positions: Tensor,
    targets: Tensor,
    *,
    shares: Tensor | None = None,
    length: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """As :func:`token_logprobs`, with any inputs of the model.

    Args:
        inputs: the model's arguments, with input_ids (R, T).
        length: T of the logits, where it is not that of input_ids (a decoder behind an encoder).
        mask: 1 for the tokens whose states the logits are made of, (R, T); None: the attention mask.
    """
    if mask is None:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    shape = (len(positions), inputs["input_ids"].shape[1] if length is None else length)
    recorder = output_gradients.active_recorder() if shares is not None and mask.shape == shape else None
    if recorder is not None:
        recorder.begin(positions, targets != IGNORE, mask)
    logits = scored_logits(model, inputs, positions, length)
    if recorder is not None and shares is not None:
        recorder.end(logits, targets, head_of(model), shares)
    return -cross_entropy(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


@tagged("activations")
def scored_logits(model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor, length: int | None = None) -> Tensor:
    """Logits (R, S, vocabulary) at `positions` (R, S), by the model's own forward of ``input_ids`` (R, T) and other inputs.

    ``length``: T of the logits; None: that of the inputs. A model with a method ``scored_logits(inputs, positions)`` (``engines``) computes
    them itself.
    """
    own = getattr(model, "scored_logits", None)
    if own is not None:
        return own(inputs, positions)
    rows, length = len(inputs["input_ids"]), inputs["input_ids"].shape[1] if length is None else length
    arguments: dict[str, Tensor | bool] = dict(inputs)
    if takes(model, "use_cache"):
        arguments["use_cache"] = False
    with _gather_before_head(model, positions, torch.Size((rows, length))) as gathered:
        logits = logits_of(model(**arguments))
    if not gathered:
        logits = _select(logits, _behind_own_tokens(logits, positions, length))
    return logits


@contextmanager
def _gather_before_head(model: nn.Module, positions: Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """Within the block the head's input is the hidden states at `positions` only.

    Yields a list that is non-empty once the head was called so. The model's own code after its head (soft-capping, scaling) then acts on
    the gathered logits.
    """
    gathered: list[bool] = []
    head = head_of(model)
    if head is None:
        yield gathered
        return

    def gather(_module: nn.Module, args: tuple) -> tuple | None:
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[0] != shape[0] or states.shape[1] < shape[1]:
            return None  # another kind of input: the logits are gathered afterwards
        gathered.append(True)
        return (_select(states, _behind_own_tokens(states, positions, shape[1])), *args[1:])

    recorder = output_gradients.active_recorder()
    transforms: list[HeadTransform] = []

    def record(_module: nn.Module, args: tuple, output: Any) -> None:
        if recorder is not None and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            recorder.head_called(args[0], output, transforms[0] if transforms else None)

    handles: list[Any] = [head.register_forward_pre_hook(gather)]
    if recorder is not None:
        handles.append(head.register_forward_hook(record))
    try:
        observed = nullcontext() if recorder is None else observing_norm(model, recorder)
        with observed, observing_transform(model, transforms) if recorder is not None else nullcontext():
            yield gathered
    finally:
        for handle in handles:
            handle.remove()


@tagged("activations")
def _behind_own_tokens(states: Tensor, positions: Tensor, length: int) -> Tensor:
    """Positions shifted by the length of a soft prompt (prompt tuning)."""
    return positions + (states.shape[1] - length)


@tagged("activations")
def _select(states: Tensor, positions: Tensor) -> Tensor:
    """(R, T, d) at positions (R, S) -> (R, S, d)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, positions]


@tagged("logits")
def cross_entropy(logits: Tensor, targets: Tensor, chunk: int = CHUNK_ELEMENTS) -> Tensor:
    """-log softmax(logits)[targets] in float32, 0 where the target is -100, of about ``chunk`` logits at a time: (N, V), (N,) -> (N,)."""
    rows = max(1, chunk // logits.shape[-1])
    chunks = [
        F.cross_entropy(at_least_float32(part), target, reduction="none", ignore_index=IGNORE)
        for part, target in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@tagged("logits")
def log_normalizers(logits: Tensor, chunk: int = CHUNK_ELEMENTS) -> Tensor:
    """log Σ exp(logits) over the last dimension in float32, of about ``chunk`` logits at a time: (N, V) -> (N,)."""
    rows = max(1, chunk // logits.shape[-1])
    chunks = [at_least_float32(part).logsumexp(dim=-1) for part in logits.split(rows)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@tagged("logits")
def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logits_of(output: object) -> Tensor:
    """The logits of a model's output.

    Raises:
        ValueError: it has none.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__} without logits: load it with its head, e.g. "
            "AutoModelForCausalLM or AutoModelForSequenceClassification."
        )
    return logits


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
