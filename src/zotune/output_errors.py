"""Output errors: what a language model's scored positions get wrong, told while a loss is computed, for a subspace that goes by them.

For −log softmax(W h)[y] the gradient in the hidden state h that the head W is given is

    δ = Wᵀ (softmax(W h) − e_y)      (d,),

known in closed form from the forward pass alone. A loss that can tell it does so where somebody watches, and costs nothing more elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Scored positions that one watch keeps, at most: a text scores all of its own.
MOST_ROWS = 512
#: Positions of any kind that are looked at in a forward.
SOME = 64

_watches: list[Watch] = []


class Watch:
    """The errors of the losses that are computed while it lasts.

    Attributes:
        scored: of the forward that runs now: positions (R, S) that are scored, which of them are kept, and the attention mask (R, T).
        errors: δ of every kept position so far, float32 on the CPU, (d,) each.
    """

    def __init__(self) -> None:
        self.scored: tuple[Tensor, Tensor, Tensor] | None = None
        self.errors: list[Tensor] = []
        self.rows = 0

    def begin(self, positions: Tensor, kept: Tensor, mask: Tensor) -> None:
        """A forward begins that scores ``positions`` (R, S) where ``kept`` (R, S), of texts with the attention ``mask`` (R, T)."""
        room = MOST_ROWS - self.rows
        if room <= 0:
            kept = torch.zeros_like(kept)
        elif int(kept.sum()) > room:
            kept = kept & (kept.flatten().cumsum(0).view(kept.shape) <= room)
        self.scored = positions, kept, mask

    def rows_of(self, states: Tensor) -> Tensor | None:
        """What a layer is given at the kept positions, (n, width), of its input (R, T′, width) or (R · T′, width); None if it is neither.

        T′ is T, or longer by what a model puts before the text (prompt tuning).
        """
        if self.scored is None:
            return None
        positions, kept, _ = self.scored
        texts = torch.arange(len(positions), device=positions.device).unsqueeze(1).expand_as(positions)
        return self._at(states, texts[kept], positions[kept])

    def some_of(self, states: Tensor) -> Tensor | None:
        """The same at :data:`SOME` positions of the texts or a few more, as far apart as can be."""
        if self.scored is None:
            return None
        texts, places = self.scored[2].nonzero(as_tuple=True)
        few = slice(None, None, max(1, len(texts) // SOME))
        return self._at(states, texts[few], places[few])

    def _at(self, states: Tensor, texts: Tensor, places: Tensor) -> Tensor | None:
        assert self.scored is not None
        rows, length = self.scored[2].shape
        flat = states.flatten(0, -2)
        longer = flat.shape[0] // rows - length
        if flat.shape[0] % rows or longer < 0:
            return None
        return flat[(texts * (length + longer) + places + longer).to(flat.device)]

    def end(self, logits: Tensor, targets: Tensor, head: nn.Module | None) -> None:
        """The forward has given ``logits`` (R, S, vocabulary) for ``targets`` (R, S); without a head that is known it tells nothing."""
        assert self.scored is not None
        kept = self.scored[1]
        self.scored = None
        weight = getattr(head, "weight", None)
        if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == logits.shape[-1] and bool(kept.any())):
            return
        probabilities = logits[kept].float().softmax(dim=-1)
        wrong = probabilities.scatter_add_(1, targets[kept].unsqueeze(1), torch.full_like(probabilities[:, :1], -1.0))
        self.errors.extend((wrong.to(weight.dtype) @ weight.detach()).float().cpu())
        self.rows += int(kept.sum())


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the losses that are computed within."""
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def watching() -> Watch | None:
    """Whoever watches now."""
    return _watches[-1] if _watches else None
