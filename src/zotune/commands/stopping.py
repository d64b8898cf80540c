"""Ctrl-C and SIGTERM in a training run: finish the step, save, leave. :class:`StopWhenAsked`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopWhenAsked(TrainerCallback):
    """Turns the first SIGINT or SIGTERM of a run into a checkpoint at the end of the step and a `KeyboardInterrupt` after it.

    A second one interrupts at once, and so does the first one outside of :meth:`listening`'s training loop. Several processes stop
    together, after the step in which all have heard of it.
    """

    def __init__(self) -> None:
        self.asked = self.stopping = False
        self._in_a_loop = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals; does nothing outside of the main thread, where signals do not arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._in_a_loop:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_a_loop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopping = self.asked
        optimizer = kwargs.get("optimizer")
        workers = getattr(getattr(optimizer, "optimizer", optimizer), "workers", None)  # accelerate wraps it
        if workers is not None and workers.several:
            workers.asked, self.stopping = self.asked, workers.told
        if self.stopping:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_a_loop = False
