"""Output errors: what a language model's scored positions get wrong, told while a loss is computed, for a subspace that goes by them.

For −log softmax(W h)[y] the gradient in the hidden state h that the head W is given is

    δ = Wᵀ (softmax(W h) − e_y)      (d,),

known in closed form from the forward pass alone; where a text's loss is a mean over its scored tokens, by the share that each has in it. A
loss that can tell it does so where somebody watches, and costs nothing more elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Positions of any kind that are looked at: for each text; of a forward, as long as there are not enough. A guide made of too few takes
#: what no other position shows for quiet.
SOME, AT_FIRST, ENOUGH = 4, 64, 512
#: Probabilities are made so many at a time (16 MiB), never of a whole batch at once.
CHUNK_ELEMENTS = 2**22

_watches: list[OutputGradientRecorder] = []


class OutputGradientRecorder:
    """The errors of the losses that are computed while it lasts.

    Args:
        most: scored positions that are kept, at most; None: every position that may be scored, those that are not with errors of 0, so
            that nothing waits for a device.

    Attributes:
        scored: of the forward that runs now: the numbers (n,) of the positions (R, S) that are kept, None for all, their texts and places
            (n,), and the attention mask (R, T).
        errors: δ of the kept positions, by how much they count in their text's loss, (n, d) in float32 of every forward so far.
        texts: the text that each belongs to, (n,) of every forward, counted through all of them.
        number: texts so far.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.scored: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None
        self.errors: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.number = self.rows = 0
        self.few = self.looked = 0  # positions of any kind, of this forward and of all

    def begin(self, positions: Tensor, scored: Tensor, mask: Tensor) -> None:
        """A forward begins that scores ``positions`` (R, S) where ``scored`` (R, S), of texts with the attention ``mask`` (R, T)."""
        self.few = max(SOME * len(positions), AT_FIRST if self.looked < ENOUGH else 0)
        self.looked += self.few
        texts = torch.arange(len(positions), device=positions.device).unsqueeze(1).expand_as(positions).flatten()
        if self.most is None:
            self.scored = None, texts, positions.flatten(), mask
        else:
            kept = scored.flatten().nonzero()[: self.most - self.rows, 0]
            self.scored = kept, texts[kept], positions.flatten()[kept], mask

    def rows_of(self, states: Tensor) -> Tensor | None:
        """What a layer is given at the kept positions, (n, width), of its input (R, T′, width) or (R · T′, width); None if it is neither.

        T′ is T, or longer by what a model puts before the text (prompt tuning).
        """
        if self.scored is None:
            return None
        _, texts, places, _ = self.scored
        return self._at(states, texts, places)

    def some_of(self, states: Tensor) -> Tensor | None:
        """The same at ``few`` positions or some more, as far apart as can be."""
        if self.scored is None:
            return None
        texts, places = self.scored[3].nonzero(as_tuple=True)
        few = slice(None, None, max(1, len(texts) // self.few))
        return self._at(states, texts[few], places[few])

    def _at(self, states: Tensor, texts: Tensor, places: Tensor) -> Tensor | None:
        assert self.scored is not None
        rows, length = self.scored[3].shape
        flat = states.flatten(0, -2)
        longer = flat.shape[0] // rows - length
        if flat.shape[0] % rows or longer < 0:
            return None
        return flat[(texts * (length + longer) + places + longer).to(flat.device)]

    def end(self, logits: Tensor, targets: Tensor, head: nn.Module | None, shares: Tensor) -> None:
        """The forward has given ``logits`` (R, S, vocabulary) for ``targets`` (R, S), ``shares`` (R,) of which make a text's loss.

        Targets below 0 are not scored. Without a head that is known it tells nothing.
        """
        (kept, texts), number = self._ended(), len(targets)
        weight = _matrix(head, logits.shape[-1])
        logits, targets = logits.flatten(0, 1), targets.flatten()
        count = len(targets) if kept is None else len(kept)
        if weight is None or not count:
            return
        parts, few = [], max(1, CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, count, few):
            some = slice(start, start + few) if kept is None else kept[start : start + few]
            wrong, target = logits[some].float().softmax(dim=-1), targets[some].clamp_min(0)
            wrong.scatter_add_(1, target.unsqueeze(1), torch.full_like(wrong[:, :1], -1.0))
            parts.append((wrong.to(weight.dtype) @ weight.detach()).float())
        counts = shares[texts] * ((targets if kept is None else targets[kept]) >= 0)
        self._tell(torch.cat(parts) * counts.unsqueeze(1), texts, number)

    def end_options(self, logits: Tensor, options: Tensor, answers: Tensor, head: nn.Module | None) -> None:
        """The same for −log softmax over the logits of ``options`` (R, C) alone at ``answers`` (R,), of ``logits`` (R, vocabulary).

        δ = Σ_c (p_c − [c = answer]) W[option c].
        """
        (kept, texts), number = self._ended(), len(options)
        weight = _matrix(head, logits.shape[-1])
        if kept is not None:
            logits, options, answers = (tensor[kept] for tensor in (logits, options, answers))
        if weight is None or not len(options):
            return
        wrong = logits.gather(1, options).float().softmax(dim=-1)
        wrong.scatter_add_(1, answers.unsqueeze(1), torch.full_like(wrong[:, :1], -1.0))
        self._tell((wrong.unsqueeze(2) * weight.detach()[options].float()).sum(dim=1), texts, number)

    def _ended(self) -> tuple[Tensor | None, Tensor]:
        assert self.scored is not None
        kept, texts, _, _ = self.scored
        self.scored = None
        return kept, texts

    def _tell(self, errors: Tensor, texts: Tensor, number: int) -> None:
        self.errors.append(errors)
        self.texts.append(texts + self.number)
        self.number += number
        self.rows += len(errors)


def _matrix(head: nn.Module | None, vocabulary: int) -> Tensor | None:
    """The weight (vocabulary, d) of a head, if that is what it is."""
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == vocabulary else None


@contextmanager
def recording(most: int | None = None) -> Iterator[OutputGradientRecorder]:
    """OutputGradientRecorder the losses that are computed within, ``most`` scored positions of them at most."""
    recorder = OutputGradientRecorder(most)
    _watches.append(recorder)
    try:
        yield recorder
    finally:
        _watches.remove(recorder)


def active_recorder() -> OutputGradientRecorder | None:
    """Whoever watches now."""
    return _watches[-1] if _watches else None
