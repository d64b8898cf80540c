"""Packed choices: one row an example, with its prompt once and all answer options after it.

An option's tokens attend to the prompt and themselves, and have the position ids of a row of the prompt and this option::

    tokens      the  cat  sat   on  a  mat   by  the  door
    segments      0    0    0    1  1    1    2    2     2
    position_ids  0    1    2    3  4    5    3    4     5

so a token's hidden state equals that of the option's own row, up to rounding, and the rows of a batch are its examples. The model must
support a four-dimensional attention mask and ``position_ids``. The first batch is scored both ways; if the results differ (the model
ignores the mask or the positions), every option has a row of its own from then on, with one warning.
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
from zotune.weights.structure import text_config

Batch = Mapping[str, Tensor]

# Attention implementations of transformers that take a four-dimensional mask: as booleans, or else as terms to add.
_MASKS = {"sdpa": True, "eager": False}
# Configuration fields with the window of attention: a packed row may exceed it where its texts do not.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")

#: Whether a model's first batch agreed, by model.
packing_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_packed(batch: Batch) -> bool:
    """Whether a batch is packed."""
    return "segments" in batch


def option_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the options' tokens, (B, C, S) in float32; 0 where the target is -100.

    Args:
        model: a causal language model.
        batch: input_ids, position_ids and segments (B, L) (segments: 0 the prompt, c an option's number from 1, -1 padding);
            positions (B, Q), the indices along L whose hidden states predict something; places (B, C, S), which of the Q predicts a
            token; targets (B, C, S); own_rows (B, C, T), the indices along L of an option's own row, -1 for padding.
    """
    if batch["positions"].shape[1] == 1:
        return _as_one_text(model, batch)  # options of one token: the row is the prompt alone
    agrees = packing_agrees.get(model)
    if agrees is False or not _may_pack(model, batch["input_ids"].shape[1]):
        return _separate(model, batch, 0, batch["targets"].shape[1])
    return _packed(model, batch) if agrees else _compared(model, batch)


def _may_pack(model: nn.Module, length: int) -> bool:
    config: Any = getattr(model, "config", None)
    if _by_segments(model):
        return True
    if getattr(config, "_attn_implementation", None) not in _MASKS or not takes(model, "position_ids"):
        return False
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):  # PEFT adds a soft prompt and sets masks and positions itself
        return False
    windows = [getattr(text_config(config), name, None) for name in _WINDOWS]
    return all(length <= window for window in windows if isinstance(window, int))


def _packed(model: nn.Module, batch: Batch) -> Tensor:
    """All options in the row of their prompt."""
    visible = {"segments": batch["segments"]} if _by_segments(model) else {"attention_mask": _visible(model, batch["segments"])}
    return _row_logprobs(model, batch, {**visible, "position_ids": batch["position_ids"]})


def _by_segments(model: nn.Module) -> bool:
    """Whether a model takes the segments themselves (``engines``)."""
    return hasattr(model, "scored_logits")


def _as_one_text(model: nn.Module, batch: Batch) -> Tensor:
    """The row as one text: the result of a model that ignores mask and positions."""
    return _row_logprobs(model, batch, {"attention_mask": (batch["segments"] >= 0).long()})


def _row_logprobs(model: nn.Module, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
    logits = scored_logits(model, {"input_ids": batch["input_ids"], **inputs}, batch["positions"])
    normalizers = log_normalizers(logits.flatten(0, 1)).view(logits.shape[:2])
    rows = torch.arange(logits.shape[0], device=logits.device).view(-1, 1, 1)
    places, targets = batch["places"], batch["targets"]
    logprobs = at_least_float32(logits[rows, places, targets.clamp(min=0)]) - normalizers[rows, places]
    return logprobs.masked_fill(targets == IGNORE, 0.0)


def _visible(model: nn.Module, segments: Tensor) -> Tensor:
    """The attention mask (B, 1, L, L): a token attends to earlier tokens of the prompt and of its own segment."""
    length = segments.shape[1]
    seen = (segments == 0).unsqueeze(1) | (segments.unsqueeze(1) == segments.unsqueeze(2))
    seen &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = seen.unsqueeze(1)
    config: Any = model.config
    if _MASKS[config._attn_implementation]:
        return seen
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _separate(model: nn.Module, batch: Batch, first: int, last: int) -> Tensor:
    """Options ``first`` to ``last - 1``, each in a row with the prompt: (B, last - first, S)."""
    targets, rows = batch["targets"][:, first:last], batch["own_rows"][:, first:last]
    places = batch["places"][:, first:last].flatten(1)
    # A token's position id is its index in the option's own row.
    positions = batch["position_ids"].gather(1, batch["positions"].gather(1, places)).view(targets.shape)
    ids = batch["input_ids"].gather(1, rows.clamp(min=0).flatten(1)).view(rows.shape)
    real = (rows >= 0).long()
    found = token_logprobs(model, *(tensor.flatten(0, 1) for tensor in (ids, real, positions, targets)))
    return found.view(targets.shape)


def _compared(model: nn.Module, batch: Batch) -> Tensor:
    """Score both ways, and choose the one to use from now on; its result."""
    # One option at a time: the comparison must not need more memory than packed scoring.
    separate = torch.cat([_separate(model, batch, option, option + 1) for option in range(batch["targets"].shape[1])], dim=1)
    if model.training or not bool(separate.isfinite().all()):
        return separate  # dropout or divergence: no comparison
    try:
        packed, one_text = _packed(model, batch), _as_one_text(model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any failure of the model with this mask or these positions
        _give_up(model, str(error))
        return separate
    half = any(p.dtype in HALF for p in model.parameters())
    rounding = (2e-3 if half else 1e-4) * (1 + separate.abs().mean())
    difference, effect = (packed - separate).abs(), (one_text - separate).abs()
    if not bool(difference.mean() <= rounding + 0.2 * effect.mean()):
        _give_up(model, f"a token's log-probability differs by {difference.max():.3g} from that in a row of its own")
        return separate
    if bool((batch["segments"] > 1).any()):  # else no option followed another: nothing was compared
        packing_agrees[model] = True
    return packed


def _give_up(model: nn.Module, reason: str) -> None:
    packing_agrees[model] = False
    warnings.warn(
        f"the answer options of {type(model).__name__} cannot share their prompt: {reason}. Scoring one row an option instead: results "
        "are right, steps are slower; ChoicesCollator(shared_prompt=False) avoids this warning.",
        stacklevel=2,
    )
