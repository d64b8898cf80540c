"""Output gradients of classifiers and sentence embeddings: those of their loss in the last block's states.

What follows the last block is small: a norm, a pooling, the classifier. The gradient in its input,

    δ = ∂ℓ/∂h   (R, T, d),

is by torch's automatic differentiation of the model's own code from there on. Nothing of the blocks is in its graph. It is 0 but at the
positions that the classifier reads; which these are is found once a model and checked where a subspace is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zotune.objectives.output_gradients import active_recorder, recorded
from zotune.weights.structure import classifier_of, last_block

Batch = Mapping[str, Tensor]
#: Rows of a batch by which the positions are found.
ROWS = 4
#: Part of ‖δ‖² outside of the positions that is rounding.
ROUNDING = 1e-6

#: Positions that a classifier reads: one for each row (R, 1), or all (R, T), and which of them are real, of the attention mask (R, T).
READS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "first": lambda mask: (torch.zeros_like(mask[:, :1]), torch.ones_like(mask[:, :1], dtype=torch.bool)),
    "last": lambda mask: (_last(mask), torch.ones_like(mask[:, :1], dtype=torch.bool)),
    "all": lambda mask: (torch.arange(mask.shape[1], device=mask.device).expand_as(mask), mask.bool()),
}

_reads: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
#: Positions of the last block's states by the shape of a row, of models that read no tokens.
_lengths: WeakKeyDictionary[nn.Module, dict[tuple[torch.Size, ...], int]] = WeakKeyDictionary()


def example_losses(model: nn.Module, batch: Batch, losses_of: Callable[[Batch], Tensor]) -> Tensor:
    """``losses_of(batch)``, the losses (R,) of a classifier; an active recorder gets their output gradients.

    Of texts the batch holds input_ids (R, T), and attention_mask (R, T) if it has padding. Without input_ids, of images or sound, T is that
    of the last block's states.
    """
    block = _observed_block(model)
    if block is None or classifier_of(model) is None:
        return losses_of(batch)
    mask = _mask(batch) if "input_ids" in batch else _all_positions(model, block, batch, losses_of)
    reads = None if mask is None else _positions_read(model, block, batch, mask, losses_of)
    if mask is None or reads is None:
        return losses_of(batch)
    return _recorded(model, block, lambda: losses_of(batch), *READS[reads](mask), mask)


def token_losses(model: nn.Module, batch: Batch, scored: Tensor, losses_of: Callable[[Batch], Tensor]) -> Tensor:
    """The same of a classifier of tokens, at the batch's positions (R, S) where ``scored`` (R, S)."""
    block = _observed_block(model)
    if block is None or classifier_of(model) is None:
        return losses_of(batch)
    return _recorded(model, block, lambda: losses_of(batch), batch["positions"], scored, _mask(batch))


def pooled_losses(model: nn.Module, mask: Tensor, pooled: Tensor, losses_of: Callable[[], Tensor]) -> Tensor:
    """The same of losses (L,) of the means of states where ``pooled`` (R, T), each of R / L rows one after the other."""
    block = _observed_block(model)
    if block is None:
        return losses_of()
    return _recorded(model, block, losses_of, READS["all"](mask)[0], pooled > 0, mask)


def _observed_block(model: nn.Module) -> nn.Module | None:
    """The model's last block, where a recorder is active."""
    return None if active_recorder() is None else last_block(model)


def _recorded(
    model: nn.Module, block: nn.Module, losses_of: Callable[[], Tensor], positions: Tensor, scored: Tensor, mask: Tensor
) -> Tensor:
    recorder = active_recorder()
    assert recorder is not None
    recorder.begin(positions, scored, mask)
    losses, states, gradients = _with_gradients(block, losses_of)
    if gradients is None or gradients.shape[:2] != mask.shape:
        recorder.abandon()
        return losses
    if recorder.max_positions is not None:  # a subspace is observed
        rows = torch.arange(len(gradients), device=gradients.device).unsqueeze(1)
        squares = gradients.float().square().sum(dim=2)
        total = squares.sum()
        if bool(total - (squares[rows, positions] * scored).sum() > ROUNDING * total):
            _reads[model] = None
            recorder.abandon()
            return losses
    recorder.end_states(states, gradients, scored, len(states) // len(losses))
    return recorded(losses)


def _with_gradients(block: nn.Module, losses_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses (R,), the last block's states h (R, T, d), the gradient of the losses' sum in h, None where they do not depend on it)."""
    with _states_of(block) as found:
        losses = losses_of()
        gradient = torch.autograd.grad(losses.sum(), found, allow_unused=True)[0] if found and losses.requires_grad else None
    return losses.detach(), found[0].detach() if found else torch.empty(0), gradient


@contextmanager
def _states_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the states that the last block gave, from which on gradients are followed."""
    found: list[Tensor] = []
    enabled = torch.is_grad_enabled()

    def leave(_module: nn.Module, _args: object, output: object) -> object:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        found[:] = [states.detach().requires_grad_()]
        torch.set_grad_enabled(True)
        return (found[0], *output[1:]) if isinstance(output, tuple) else found[0]

    handle = block.register_forward_hook(leave)
    try:
        yield found
    finally:
        torch.set_grad_enabled(enabled)
        handle.remove()


def _all_positions(model: nn.Module, block: nn.Module, batch: Batch, losses_of: Callable[[Batch], Tensor]) -> Tensor | None:
    """Ones (R, T) for the positions of the last block's states, by a forward of one row for each shape of rows; None without such states.

    Positions of padding are among them: no loss depends on them, and their gradients are 0.
    """
    shape = tuple(value.shape[1:] for value in batch.values())
    known = _lengths.setdefault(model, {})
    if shape not in known:
        with _states_of(block) as found:
            losses_of({name: value[:1] for name, value in batch.items()})
        known[shape] = found[0].shape[1] if found and len(found[0]) == 1 else 0
    rows, device = len(batch["labels"]), batch["labels"].device
    return torch.ones(rows, known[shape], dtype=torch.long, device=device) if known[shape] else None


def _positions_read(model: nn.Module, block: nn.Module, batch: Batch, mask: Tensor, losses_of: Callable[[Batch], Tensor]) -> str | None:
    """The name in :data:`READS` of the positions that the classifier reads, by a forward of a few rows; None for others.

    Without tokens these are all where no other name fits: a gradient of 0 changes nothing.
    """
    if model not in _reads:
        few, mask = {name: value[:ROWS] for name, value in batch.items()}, mask[:ROWS]
        _, _, gradients = _with_gradients(block, lambda: losses_of(few))
        if gradients is None or gradients.shape[:2] != mask.shape or not bool(gradients.isfinite().all()):
            return None
        read = gradients.ne(0).any(dim=2)
        told = read.any(dim=1)
        if not bool(told.any()):
            return None
        same = [name for name, places in READS.items() if bool((_chosen(*places(mask), mask) == read)[told].all())]
        _reads[model] = same[0] if same else None if "input_ids" in batch else "all"
    return _reads[model]


def _chosen(positions: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.bool).scatter_(1, positions, real)


def _mask(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _last(mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return places.masked_fill(mask == 0, -1).amax(dim=1, keepdim=True).clamp_min(0)
