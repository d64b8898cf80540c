"""Buffers that an evaluation leaves as they are, though the model's forward writes them.

Evaluation mode keeps the running statistics of a batch norm and the power iteration of a spectral norm. A module may write a buffer all the
same (a count of calls, a moving average). Such a buffer would depend on how a step's points are evaluated, and no journal has it: so every
evaluation starts from its value of before the run. Buffers that a state dict leaves out (caches) are free.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from zotune.io.memory_tags import memory_tag
from zotune.weights.digest import persistent_buffers

#: Elements of a buffer that is copied before it is known to be written: others hold weights of quantized layers.
SMALL = 2**20


class KeptBuffers:
    """The buffers of a model that evaluations put back.

    Attributes:
        written: names of those that a forward was seen to write in place, of which every evaluation keeps a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [(full, module, name) for full, module, name, _ in persistent_buffers(model)]
        self._known = False  # which buffers are written
        self._said: set[str] = set()
        self.written: set[str] = set()

    @contextmanager
    def kept(self, runs: bool) -> Iterator[None]:
        """Afterwards all buffers are those of before; a warning names, once, the ones that were written.

        ``runs``: whether the block is known to run the model, and so shows which buffers it writes.
        """
        before = [(full, module, name, module._buffers.get(name)) for full, module, name in self._places]
        versions = {full: _version(buffer) for full, _, _, buffer in before}
        with memory_tag("temporary"):
            copies = {full: b.clone() for full, _, _, b in before if b is not None and self._may_be_written(full, b)}
        try:
            yield
        finally:
            self._known = self._known or runs
            changed = []
            for full, module, name, buffer in before:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                    changed.append(full)
                if _version(buffer) != versions[full]:
                    if buffer is not None and full in copies:
                        buffer.copy_(copies[full])
                    self.written.add(full)
                    changed.append(full)
            self._say(changed)

    def _may_be_written(self, full: str, buffer: Tensor) -> bool:
        return full in self.written or (not self._known and buffer.numel() <= SMALL)

    def _say(self, changed: list[str]) -> None:
        new = [full for full in dict.fromkeys(changed) if full not in self._said]
        self._said.update(new)
        if new:
            warnings.warn(
                f"the model's forward writes buffers in evaluation mode ({', '.join(new[:5])}): every evaluation of a step starts from "
                "their values of before it, and training leaves them as they are.",
                stacklevel=2,
            )


def _version(buffer: Tensor | None) -> int | None:
    """Grows with every write in place."""
    return None if buffer is None or buffer.is_inference() else buffer._version
