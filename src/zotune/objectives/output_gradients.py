"""Output gradients: the gradient of a language model's loss in its head's input, recorded while the loss is computed.

For −log softmax(W h)[y] the gradient in the hidden state h, the input of the head W, is

    δ = Wᵀ (softmax(W h) − e_y)      (d,),

a closed form of the forward pass. Where an example's loss is a mean over its scored tokens, δ is weighted by each token's share. A loss
computes δ only while a recorder is active.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Sampled positions: for each example; of a forward, until there are enough. Too small a sample underestimates the inputs' variance.
SAMPLED_PER_EXAMPLE, SAMPLED_AT_FIRST, ENOUGH = 4, 64, 512
#: Elements of probabilities computed at a time (16 MiB), never of a whole batch.
CHUNK_ELEMENTS = 2**22

_recorders: list[OutputGradientRecorder] = []


class OutputGradientRecorder:
    """The output gradients of the losses computed while it is active.

    Args:
        max_positions: scored positions to record, at most; None: all positions that may be scored, with zeros for those that are not, so
            that nothing waits for a device.

    Attributes:
        scored: of the current forward: the indices (n,) of the recorded positions (R, S), None for all, their examples and positions (n,),
            and the attention mask (R, T).
        gradients: δ of the recorded positions, weighted, (n, d) in float32 of every forward so far.
        examples: the example of each, (n,) of every forward, counted through all of them.
        num_examples: examples so far.
    """

    def __init__(self, max_positions: int | None = None) -> None:
        self.max_positions = max_positions
        self.scored: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None
        self.gradients: list[Tensor] = []
        self.examples: list[Tensor] = []
        self.num_examples = self.num_positions = 0
        self.sample_size = self.sampled = 0  # sampled positions of this forward, and of all

    def begin(self, positions: Tensor, scored: Tensor, mask: Tensor) -> None:
        """A forward starts that scores ``positions`` (R, S) where ``scored`` (R, S), with the attention ``mask`` (R, T)."""
        self.sample_size = max(SAMPLED_PER_EXAMPLE * len(positions), SAMPLED_AT_FIRST if self.sampled < ENOUGH else 0)
        self.sampled += self.sample_size
        examples = torch.arange(len(positions), device=positions.device).unsqueeze(1).expand_as(positions).flatten()
        if self.max_positions is None:
            self.scored = None, examples, positions.flatten(), mask
        else:
            kept = scored.flatten().nonzero()[: self.max_positions - self.num_positions, 0]
            self.scored = kept, examples[kept], positions.flatten()[kept], mask

    def scored_rows(self, states: Tensor) -> Tensor | None:
        """Rows (n, width) of a layer's input (R, T′, width) or (R · T′, width) at the recorded positions; None for other shapes.

        T′ is T plus the length of a soft prompt (prompt tuning).
        """
        if self.scored is None:
            return None
        _, examples, positions, _ = self.scored
        return self._rows(states, examples, positions)

    def sampled_rows(self, states: Tensor) -> Tensor | None:
        """The same at ``sample_size`` or more positions of any kind, evenly spaced."""
        if self.scored is None:
            return None
        examples, positions = self.scored[3].nonzero(as_tuple=True)
        sample = slice(None, None, max(1, len(examples) // self.sample_size))
        return self._rows(states, examples[sample], positions[sample])

    def _rows(self, states: Tensor, examples: Tensor, positions: Tensor) -> Tensor | None:
        assert self.scored is not None
        rows, length = self.scored[3].shape
        flat = states.flatten(0, -2)
        prompt = flat.shape[0] // rows - length
        if flat.shape[0] % rows or prompt < 0:
            return None
        return flat[(examples * (length + prompt) + positions + prompt).to(flat.device)]

    def end(self, logits: Tensor, targets: Tensor, head: nn.Module | None, shares: Tensor) -> None:
        """The forward gave ``logits`` (R, S, vocabulary) for ``targets`` (R, S), each ``shares`` (R,) of its example's loss.

        Targets below 0 are not scored. Without a known head nothing is recorded.
        """
        (kept, examples), count = self._end_forward(), len(targets)
        weight = _matrix(head, logits.shape[-1])
        logits, targets = logits.flatten(0, 1), targets.flatten()
        size = len(targets) if kept is None else len(kept)
        if weight is None or not size:
            return
        parts, step = [], max(1, CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, size, step):
            part = slice(start, start + step) if kept is None else kept[start : start + step]
            error, target = logits[part].float().softmax(dim=-1), targets[part].clamp_min(0)
            error.scatter_add_(1, target.unsqueeze(1), torch.full_like(error[:, :1], -1.0))
            parts.append((error.to(weight.dtype) @ weight.detach()).float())
        weights = shares[examples] * ((targets if kept is None else targets[kept]) >= 0)
        self._record(torch.cat(parts) * weights.unsqueeze(1), examples, count)

    def end_options(self, logits: Tensor, options: Tensor, answers: Tensor, head: nn.Module | None) -> None:
        """The same for −log softmax over the logits of ``options`` (R, C) alone at ``answers`` (R,), of ``logits`` (R, vocabulary).

        δ = Σ_c (p_c − [c = answer]) W[option c].
        """
        (kept, examples), count = self._end_forward(), len(options)
        weight = _matrix(head, logits.shape[-1])
        if kept is not None:
            logits, options, answers = (tensor[kept] for tensor in (logits, options, answers))
        if weight is None or not len(options):
            return
        error = logits.gather(1, options).float().softmax(dim=-1)
        error.scatter_add_(1, answers.unsqueeze(1), torch.full_like(error[:, :1], -1.0))
        self._record((error.unsqueeze(2) * weight.detach()[options].float()).sum(dim=1), examples, count)

    def _end_forward(self) -> tuple[Tensor | None, Tensor]:
        assert self.scored is not None
        kept, examples, _, _ = self.scored
        self.scored = None
        return kept, examples

    def _record(self, gradients: Tensor, examples: Tensor, count: int) -> None:
        self.gradients.append(gradients)
        self.examples.append(examples + self.num_examples)
        self.num_examples += count
        self.num_positions += len(gradients)


def _matrix(head: nn.Module | None, vocabulary: int) -> Tensor | None:
    """The weight of a head, if it is (vocabulary, d)."""
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == vocabulary else None


@contextmanager
def recording(max_positions: int | None = None) -> Iterator[OutputGradientRecorder]:
    """A recorder that is active within the block, for ``max_positions`` scored positions at most."""
    recorder = OutputGradientRecorder(max_positions)
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def active_recorder() -> OutputGradientRecorder | None:
    """The innermost active recorder."""
    return _recorders[-1] if _recorders else None
