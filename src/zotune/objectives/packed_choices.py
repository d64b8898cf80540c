"""Answer options that share their prompt: one row an example, in which the prompt stands once and every option behind it.

An option's tokens see the prompt and themselves, no other option, and are at the positions they have behind the prompt alone::

    tokens      the  cat  sat   on  a  mat   by  the  door
    segments      0    0    0    1  1    1    2    2     2
    position_ids  0    1    2    3  4    5    3    4     5

so a token's hidden state is what it is in a row of the prompt and its option, up to rounding, and the rows of a batch stay its examples.
The model's part in it is a four-dimensional attention mask and ``position_ids``. The first batch is scored both ways; a model whose two
answers differ (it ignores the mask, or the positions) scores one row an option from then on, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zotune.objectives.token_logprobs import IGNORE, at_least_float32, log_normalizers, scored_logits, takes, token_logprobs
from zotune.weights.precision import HALF

Batch = Mapping[str, Tensor]

# Attention implementations of transformers that take a four-dimensional mask, and whether as booleans (or else as numbers to add).
_MASKS = {"sdpa": True, "eager": False}
# Names under which configurations keep the reach of attention; a packed row that is longer may be cut where its texts would not be.
_REACHES = ("sliding_window", "attention_chunk_size", "window_size")

#: What the first batch has shown of a model.
_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_packed(batch: Batch) -> bool:
    """Whether a batch is in this form."""
    return "segments" in batch


def option_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the options' tokens, (B, C, S) in float32; 0 where the target is -100.

    Args:
        model: a causal language model.
        batch: input_ids, position_ids and segments (B, L) (segments: 0 the prompt, c an option's number from 1, -1 padding);
            positions (B, Q), the places along L whose hidden states predict something; places (B, C, S), which of the Q predicts a
            token; targets (B, C, S); own_rows (B, C, T), the places along L that make an option's row of its own, -1 for padding.
    """
    if batch["positions"].shape[1] == 1:
        return _run_on(model, batch)  # options of one token: the row is the prompt alone, as any model reads it
    agrees = _agrees.get(model)
    if agrees is False or not _may_pack(model, batch["input_ids"].shape[1]):
        return _apart(model, batch, 0, batch["targets"].shape[1])
    return _together(model, batch) if agrees else _compared(model, batch)


def _may_pack(model: nn.Module, length: int) -> bool:
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in _MASKS or not takes(model, "position_ids"):
        return False
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):  # PEFT puts tokens before the text and sets masks and positions itself
        return False
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    reaches = [getattr(config, name, None) for name in _REACHES]
    return all(length <= reach for reach in reaches if isinstance(reach, int))


def _together(model: nn.Module, batch: Batch) -> Tensor:
    """All options in the row of their prompt."""
    return _row_logprobs(model, batch, {"attention_mask": _visible(model, batch["segments"]), "position_ids": batch["position_ids"]})


def _run_on(model: nn.Module, batch: Batch) -> Tensor:
    """The row as one text, in which an option reads on behind the one before: what a model makes of it that heeds nothing."""
    return _row_logprobs(model, batch, {"attention_mask": (batch["segments"] >= 0).long()})


def _row_logprobs(model: nn.Module, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
    logits = scored_logits(model, {"input_ids": batch["input_ids"], **inputs}, batch["positions"])
    normalizers = log_normalizers(logits.flatten(0, 1)).view(logits.shape[:2])
    rows = torch.arange(logits.shape[0], device=logits.device).view(-1, 1, 1)
    places, targets = batch["places"], batch["targets"]
    logprobs = at_least_float32(logits[rows, places, targets.clamp(min=0)]) - normalizers[rows, places]
    return logprobs.masked_fill(targets == IGNORE, 0.0)


def _visible(model: nn.Module, segments: Tensor) -> Tensor:
    """The attention mask (B, 1, L, L): a token sees what stands before it in the prompt and in its own segment."""
    length = segments.shape[1]
    seen = (segments == 0).unsqueeze(1) | (segments.unsqueeze(1) == segments.unsqueeze(2))
    seen &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = seen.unsqueeze(1)
    config: Any = model.config
    if _MASKS[config._attn_implementation]:
        return seen
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _apart(model: nn.Module, batch: Batch, first: int, last: int) -> Tensor:
    """Options ``first`` to ``last - 1``, each in a row with the prompt: (B, last - first, S)."""
    targets, rows = batch["targets"][:, first:last], batch["own_rows"][:, first:last]
    places = batch["places"][:, first:last].flatten(1)
    # A token's position id is its place in a row of its own.
    positions = batch["position_ids"].gather(1, batch["positions"].gather(1, places)).view(targets.shape)
    ids = batch["input_ids"].gather(1, rows.clamp(min=0).flatten(1)).view(rows.shape)
    real = (rows >= 0).long()
    found = token_logprobs(model, *(tensor.flatten(0, 1) for tensor in (ids, real, positions, targets)))
    return found.view(targets.shape)


def _compared(model: nn.Module, batch: Batch) -> Tensor:
    """Both ways, and the verdict; the result is that of the way that is taken from now on."""
    # One option after the other: whatever fits in memory packed shall not run out of it in being checked.
    apart = torch.cat([_apart(model, batch, option, option + 1) for option in range(batch["targets"].shape[1])], dim=1)
    if model.training or not bool(apart.isfinite().all()):
        return apart  # dropout, or a model that has diverged: nothing can be told from it
    try:
        together, run_on = _together(model, batch), _run_on(model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a mask or positions it did not expect
        _give_up(model, str(error))
        return apart
    half = any(p.dtype in HALF for p in model.parameters())
    rounding = (2e-3 if half else 1e-4) * (1 + apart.abs().mean())
    difference, effect = (together - apart).abs(), (run_on - apart).abs()
    if not bool(difference.mean() <= rounding + 0.2 * effect.mean()):
        _give_up(model, f"a token's log-probability differs by {difference.max():.3g} from that in a row of its own")
        return apart
    if bool((batch["segments"] > 1).any()):  # else no option stood behind another, and nothing could go wrong
        _agrees[model] = True
    return together


def _give_up(model: nn.Module, reason: str) -> None:
    _agrees[model] = False
    warnings.warn(
        f"the answer options of {type(model).__name__} cannot share their prompt: {reason}. Scoring one row an option instead: results "
        "are right, steps are slower; ChoicesCollator(shared_prompt=False) avoids this warning.",
        stacklevel=2,
    )
