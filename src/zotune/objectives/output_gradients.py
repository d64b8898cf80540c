"""Output gradients: the gradient of a language model's loss in its head's input, recorded while the loss is computed.

For −log softmax(W h)[y] the gradient in the hidden state h, the input of the head W, is

    δ = Wᵀ (softmax(W h) − e_y)      (d,),

a closed form of the forward pass. Where an example's loss is a mean over its scored tokens, δ is weighted by each token's share. A loss
computes δ only while a recorder is active. Behind a final norm δ is followed through that (:mod:`zotune.objectives.final_norm`), behind the
transform of a masked language model through this (:mod:`zotune.objectives.head_transform`); that of a classifier is made in
:mod:`zotune.objectives.tail_gradients`.

δ is the gradient of the recorded loss. The recorder therefore also follows what the loss function makes of that loss
(:mod:`zotune.objectives.returned_losses`), and, where it samples positions, whether the logits are what the head gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zotune.objectives import returned_losses
from zotune.objectives.final_norm import NormedRows
from zotune.objectives.head_transform import HeadTransform
from zotune.objectives.head_weight import HeadWeight, head_weight
from zotune.weights.layouts import layout_of

#: Sampled positions: of each row, and of the first one, with half as many of every next. Too small a sample underestimates the inputs'
#: variance.
SAMPLED_PER_ROW, SAMPLED_AT_FIRST = 4, 64
#: Shift of the sampled positions from row to row, a fraction of their distance: over many rows all places in a text are sampled alike.
SHIFT = (5**0.5 - 1) / 2
#: Elements of probabilities computed at a time (16 MiB), never of a whole batch.
CHUNK_ELEMENTS = 2**22
#: Recorded positions whose logits are compared with the head's output, and the difference that is rounding, relative to the largest.
COMPARED, ROUNDING, ROUNDING_HALF = 16, 1e-3, 2e-2

_recorders: list[OutputGradientRecorder] = []


class OutputGradientRecorder:
    """The output gradients of the losses computed while it is active.

    What it records depends on the examples and their order, not on how they are cut into forwards.

    Args:
        max_positions: scored positions to record, at most; None: all positions that may be scored, with zeros for those that are not, so
            that nothing waits for a device.
        max_rows: only the first rows have recorded positions; None: all.
        chunk: logits whose softmax is taken at a time, about.

    Attributes:
        scored: of the current forward: the indices (n,) of the recorded positions (R, S), None for all, their examples and positions (n,),
            and the attention mask (R, T).
        gradients: δ of the recorded positions, weighted, (n, d) in float32 of every forward so far; behind a final norm
            (:mod:`zotune.objectives.final_norm`) those in what the layers add to.
        examples: the example of each, (n,) of every forward, counted through all of them.
        num_examples: examples so far.
        hidden: the head's input at the recorded positions of every forward so far, (n, d), where ``keeps_hidden``.
        factors: of every call so far, the factor of each example's recorded loss in what was returned.
        incomplete: whether an engine computes some layers at scored positions alone, with zeros elsewhere: those are their sample then.
        logits_differ: whether some logits were not a multiple of the head's output, or not comparable.
    """

    def __init__(self, max_positions: int | None = None, max_rows: int | None = None, chunk: int = CHUNK_ELEMENTS) -> None:
        self.max_positions, self.max_rows, self.chunk = max_positions, max_rows, chunk
        self.scored: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None
        self.gradients: list[Tensor] = []
        self.examples: list[Tensor] = []
        self.num_examples = self.num_positions = 0
        self.rows = 0  # of all forwards, this one included
        self._sample: tuple[Tensor, Tensor] | None = None  # rows and places of the sampled positions of this forward
        self.keeps_hidden = self.incomplete = False
        self.hidden: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.logits_differ = self._following = False
        self._losses: list[Tensor] = []  # recorded in this call
        self._from_head: tuple[Tensor, Tensor] | None = None  # the head's input and output in this forward
        self._transform: HeadTransform | None = None  # what stands before the head in this forward
        self._norm: NormedRows | None = None  # the final norm at the recorded positions of this forward
        self._recorded = False  # this forward has output gradients
        self._call = 0, 0  # output gradients and examples before this call

    def begin(self, positions: Tensor, scored: Tensor, mask: Tensor) -> None:
        """A forward starts that scores ``positions`` (R, S) where ``scored`` (R, S), with the attention ``mask`` (R, T)."""
        before, self.rows = self.rows, self.rows + len(positions)
        self._from_head, self._transform, self._norm, self._recorded, self._sample = None, None, None, False, None
        examples = torch.arange(len(positions), device=positions.device).unsqueeze(1).expand_as(positions).flatten()
        if self.max_positions is None:
            self.scored = None, examples, positions.flatten(), mask
        else:
            if self.max_rows is not None:
                scored = scored[: max(0, self.max_rows - before)]
            kept = scored.flatten().nonzero()[: self.max_positions - self.num_positions, 0]
            self.scored = kept, examples[kept], positions.flatten()[kept], mask

    @property
    def full(self) -> bool:
        """Whether no further forward has positions to record."""
        positions = self.max_positions is not None and self.num_positions >= self.max_positions
        return positions or (self.max_rows is not None and self.rows >= self.max_rows)

    def scored_rows(self, states: Tensor) -> Tensor | None:
        """Rows (n, width) of a layer's input (R, T′, width) or (R · T′, width) at the recorded positions; None for other shapes.

        T′ is T plus the length of a soft prompt (prompt tuning).
        """
        if self.scored is None:
            return None
        _, examples, positions, _ = self.scored
        return self._rows(states, examples, positions)

    def sampled_rows(self, states: Tensor) -> Tensor | None:
        """The same at positions of any kind, a few of every row, evenly spaced."""
        if self.scored is None:
            return None
        sample = self.sample
        found = None if sample is None else self._rows(states, *sample)
        if found is None or not self.incomplete:
            return found
        return found if bool(found.any(dim=1).all()) else self.scored_rows(states)

    @property
    def sample(self) -> tuple[Tensor, Tensor] | None:
        """(rows, positions) of :meth:`sampled_rows` in this forward; None where nothing is observed."""
        if self.scored is None or self.max_positions is None:
            return None
        if self._sample is None:
            self._sample = _sampled_positions(self.scored[3], self.rows - len(self.scored[3]))
        return self._sample

    def scored_places(self, states: Tensor) -> Tensor | None:
        """Where the rows of :meth:`scored_rows` are among all rows of ``states``, (n,)."""
        if self.scored is None:
            return None
        _, examples, positions, _ = self.scored
        return self._places(states, examples, positions)

    def _rows(self, states: Tensor, examples: Tensor, positions: Tensor) -> Tensor | None:
        places = self._places(states, examples, positions)
        return None if places is None else states.flatten(0, -2)[places]

    def _places(self, states: Tensor, examples: Tensor, positions: Tensor) -> Tensor | None:
        assert self.scored is not None
        rows, length = self.scored[3].shape
        total = states.shape[:-1].numel()
        prompt = total // rows - length
        if total % rows or prompt < 0:
            return None
        return (examples * (length + prompt) + positions + prompt).to(states.device)

    def end(self, logits: Tensor, targets: Tensor, head: nn.Module | None, shares: Tensor) -> None:
        """The forward gave ``logits`` (R, S, vocabulary) for ``targets`` (R, S), each ``shares`` (R,) of its example's loss.

        Targets below 0 are not scored. Without a known head nothing is recorded.
        """
        self._observe_head(logits, head)
        (kept, examples, places), count = self._end_forward(), len(targets)
        weight = _weight(head, logits.shape[-1])
        logits, targets = logits.flatten(0, 1), targets.flatten()
        size = len(targets) if kept is None else len(kept)
        if weight is None or not size:
            return
        parts, step = [], max(1, self.chunk // logits.shape[-1])
        for start in range(0, size, step):
            part = slice(start, start + step) if kept is None else kept[start : start + step]
            error, target = logits[part].float().softmax(dim=-1), targets[part].clamp_min(0)
            error.scatter_add_(1, target.unsqueeze(1), torch.full_like(error[:, :1], -1.0))
            parts.append(weight.product(error))
        weights = shares[examples] * ((targets if kept is None else targets[kept]) >= 0)
        self._record(self._behind(torch.cat(parts) * weights.unsqueeze(1), kept, examples, places), examples, count)

    def end_options(self, logits: Tensor, options: Tensor, answers: Tensor, head: nn.Module | None) -> None:
        """The same for −log softmax over the logits of ``options`` (R, C) alone at ``answers`` (R,), of ``logits`` (R, vocabulary).

        δ = Σ_c (p_c − [c = answer]) W[option c].
        """
        self._observe_head(logits.unsqueeze(1), head)
        (kept, examples, places), count = self._end_forward(), len(options)
        weight = _weight(head, logits.shape[-1])
        if kept is not None:
            logits, options, answers = (tensor[kept] for tensor in (logits, options, answers))
        if weight is None or not len(options):
            return
        error = logits.gather(1, options).float().softmax(dim=-1)
        error.scatter_add_(1, answers.unsqueeze(1), torch.full_like(error[:, :1], -1.0))
        gradients = (error.unsqueeze(2) * weight.rows(options)).sum(dim=1)
        self._record(self._behind(gradients, kept, examples, places), examples, count)

    def end_states(self, states: Tensor, gradients: Tensor, scored: Tensor, each: int = 1) -> None:
        """The forward gave the last hidden ``states`` (R, T, d), in which its losses have these ``gradients``; taken where ``scored``.

        ``each``: rows that a loss is of.
        """
        kept, examples, positions = self._end_forward()
        if self.keeps_hidden:
            self.hidden.append(states[examples, positions].float())
        real = scored.flatten() if kept is None else scored.flatten()[kept]
        self._record(gradients[examples, positions].float() * real.unsqueeze(1), examples // each, len(states) // each)

    def abandon(self) -> None:
        """The forward gave nothing to record."""
        self.scored = None

    def _end_forward(self) -> tuple[Tensor | None, Tensor, Tensor]:
        assert self.scored is not None
        kept, examples, positions, _ = self.scored
        self.scored = None
        return kept, examples, positions

    def _behind(self, gradients: Tensor, kept: Tensor | None, examples: Tensor, positions: Tensor) -> Tensor:
        """The gradients in the last hidden states, of those in the head's input (n, e), which stay these where ``hidden`` holds that."""
        transform, norm, called = self._transform, self._norm, self._from_head
        self._transform, self._norm, self._from_head = None, None, None
        if transform is not None:
            return transform.behind(gradients, kept, examples, positions)
        if norm is None or called is None or self.keeps_hidden or norm.outputs.shape != gradients.shape:
            return gradients  # of what ``hidden`` holds
        inputs = _kept(called[0].flatten(0, -2), kept)
        return torch.where(norm.gives(inputs), norm.behind(gradients), gradients) if len(inputs) == len(gradients) else gradients

    def _record(self, gradients: Tensor, examples: Tensor, count: int) -> None:
        self.gradients.append(gradients)
        self.examples.append(examples + self.num_examples)
        self.num_examples += count
        self.num_positions += len(gradients)
        self._recorded = True

    # -- the head ---------------------------------------------------------------------------------------------------------------------

    def head_called(self, states: Tensor, output: Tensor, transform: HeadTransform | None = None) -> None:
        """The head gave ``output`` (..., vocabulary) for ``states`` (..., d) in this forward, behind a ``transform``."""
        self._transform = transform
        if self.scored is not None:
            self._from_head = states, output

    def norm_called(self, norm: NormedRows) -> None:
        """What may be the final norm was called in this forward, the last one so far."""
        self._norm = norm

    def kept_rows(self, states: Tensor) -> Tensor:
        """Those of the scored positions' ``states`` (R, S, d) that are recorded in this forward, (n, d)."""
        assert self.scored is not None
        return _kept(states.flatten(0, 1), self.scored[0])

    @property
    def wants_logits(self) -> bool:
        """Whether the output of :meth:`head_called` is of use in this forward."""
        return self.scored is not None and self.max_positions is not None

    def _observe_head(self, logits: Tensor, head: nn.Module | None) -> None:
        """Compare the logits (R, S, vocabulary) of a few recorded positions with the head's output, up to one factor."""
        kept, examples, positions, _ = self.scored or (None, None, None, None)
        if kept is None or examples is None or positions is None or not len(kept):  # all positions are recorded: nothing is compared
            return
        if self._from_head is None:
            self.logits_differ = True
            return
        states, output = self._from_head
        gathered = states.shape[:-1] == logits.shape[:-1]
        inputs = states.flatten(0, -2)[kept] if gathered else self._rows(states, examples, positions)
        if inputs is None:
            self.logits_differ = True
            return
        if self.keeps_hidden:
            last = inputs if self._transform is None else self._transform.states[examples, positions]
            self.hidden.append(last.detach().float())
        few = slice(0, COMPARED)
        if head is None or _weight(head, logits.shape[-1]) is None:
            return
        given = logits.flatten(0, 1)[kept[few]].float()
        weight = getattr(head, "weight", None)
        if layout_of(head) is not None or weight is None:  # its output includes updates that its weight does not; or an engine's
            made = output.flatten(0, -2)[kept[few]] if gathered else self._rows(output, examples[few], positions[few])
        else:
            bias = getattr(head, "bias", None)
            made = nn.functional.linear(inputs[few].to(weight.dtype), weight.detach(), bias if isinstance(bias, Tensor) else None)
        if made is None or made.shape != given.shape:
            self.logits_differ = True
            return
        if not bool(given.isfinite().all()):  # nothing to compare; the step itself refuses a loss that is not finite
            return
        made = made.detach().float()
        factor = (made * given).sum() / made.square().sum().clamp_min(1e-30)
        rounding = ROUNDING if weight is None or weight.dtype.itemsize >= 4 else ROUNDING_HALF
        close = (given - factor * made).abs().max() <= rounding * given.abs().max()
        self.logits_differ |= not (bool(close) and (float(factor) > 0 or not given.any()))

    # -- what is returned -------------------------------------------------------------------------------------------------------------

    def end_losses(self, losses: Tensor) -> Tensor:
        """Record the losses (R,) of the forward that just ended; returns them, for the loss function to make its own of."""
        if not self._recorded:
            return losses
        self._recorded = False
        first = sum(map(len, self._losses))
        self._losses.append(losses.detach())
        if not self._following:
            return losses
        return forward_ad.make_dual(losses, returned_losses.tangents(losses, first))

    @contextmanager
    def following(self) -> Iterator[None]:
        """For one call of a loss function: derivatives in the recorded losses are followed through what it computes of them."""
        self._losses, self._call = [], (len(self.gradients), self.num_examples)
        self._following = True
        try:
            with forward_ad.dual_level():
                yield
        finally:
            self._following = False

    def end_call(self, returned: Any) -> Tensor:
        """The call returned this: whether each of these losses is a known multiple of a recorded one (or of their mean), (n,).

        The output gradients of the call are multiplied by the factors, by 0 where there is none.
        """
        if not self._losses:
            return torch.full((returned.numel() if isinstance(returned, Tensor) else 1,), self.full)
        factors, valid = returned_losses.factors(returned, torch.cat(self._losses))
        self.factors.append(factors)
        first, base = self._call
        for place in range(first, len(self.gradients)):
            self.gradients[place] = self.gradients[place] * factors[self.examples[place] - base].unsqueeze(1)
        return valid


def _kept(rows: Tensor, kept: Tensor | None) -> Tensor:
    """These of all rows; all where they are not as many."""
    return rows if kept is None or not len(kept) or len(rows) <= int(kept.amax()) else rows[kept]


def _sampled_positions(mask: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(rows, positions) of the sample of a forward whose row 0 is number ``first`` of all; ``mask`` (R, T)."""
    chosen, start = [], 0
    for number, length in enumerate(mask.sum(dim=1).tolist(), first):
        count = min(length, max(SAMPLED_PER_ROW, SAMPLED_AT_FIRST >> number))
        shift = number * SHIFT % 1
        chosen += [start + int((place + shift) * length / count) for place in range(count)]
        start += length
    rows, positions = mask.nonzero(as_tuple=True)
    index = torch.tensor(chosen, dtype=torch.long, device=mask.device)
    return rows[index], positions[index]


def _weight(head: nn.Module | None, vocabulary: int) -> HeadWeight | None:
    """The weight of a head, if it is (vocabulary, d)."""
    weight = head_weight(head)
    return weight if weight is not None and weight.shape[0] == vocabulary else None


@contextmanager
def recording(
    max_positions: int | None = None, max_rows: int | None = None, chunk: int = CHUNK_ELEMENTS
) -> Iterator[OutputGradientRecorder]:
    """A recorder that is active within the block; the arguments are the recorder's."""
    recorder = OutputGradientRecorder(max_positions, max_rows, chunk)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def active_recorder() -> OutputGradientRecorder | None:
    """The innermost active recorder."""
    return _recorders[-1] if _recorders else None


def recorded(losses: Tensor) -> Tensor:
    """The losses (B,) of the forward that just ended, which an active recorder gets."""
    recorder = active_recorder()
    return losses if recorder is None else recorder.end_losses(losses)
