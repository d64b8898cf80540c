"""Callbacks of a run: :class:`StopOnSignal` ends it after a step, :class:`StepClock` adds times and forward passes to the log."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """At the first SIGINT or SIGTERM of a training loop: a checkpoint at the end of the step, then `KeyboardInterrupt`.

    A second signal interrupts at once, as does one outside of the loop. Several processes stop after the same step.
    """

    def __init__(self) -> None:
        self.requested = self.stopping = False
        self._in_loop = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals; does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._in_loop:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_loop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopping = self.requested
        optimizer = kwargs.get("optimizer")
        workers = getattr(getattr(optimizer, "optimizer", optimizer), "workers", None)  # accelerate wraps it
        if workers is not None and workers.several:
            workers.stop_requested, self.stopping = self.requested, workers.stopping
        if self.stopping:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_loop = False


class StepClock(TrainerCallback):
    """Adds to the entries of `state.log_history`: ``seconds`` and ``processor_seconds`` of steps, ``forward_passes``, ``sequences``.

    The times are those of ``timed_steps`` steps: neither steps retaken from a journal nor those of a resumed run between the last entry and
    its checkpoint are among them. On a shared machine the processor time is the better measure.

    Attributes:
        evaluation_seconds: seconds of evaluations since training began.
    """

    evaluation_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        last: dict[str, float] = next((entry for entry in reversed(state.log_history) if "processor_seconds" in entry), {})
        self.seconds, self.processor_seconds = last.get("seconds", 0.0), last.get("processor_seconds", 0.0)
        self.timed_steps = int(last.get("timed_steps", 0))
        self.optimizer: Any = None
        self.evaluation_seconds = 0.0

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        self.retaken = bool(getattr(getattr(optimizer, "optimizer", optimizer), "tail", ()))
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        if not self.retaken:
            self.timed_steps += 1
            self.seconds += time.perf_counter() - self._clock
            self.processor_seconds += time.process_time() - self._processor
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    def on_evaluate(self, args, state, control, metrics=None, **kwargs: Any) -> None:
        self.evaluation_seconds += (metrics or {}).get("eval_runtime", 0.0)

    def on_log(self, args, state, control, **kwargs: Any) -> None:
        if self.optimizer is None or not state.log_history:
            return
        # How long a private step takes tells how many examples it has drawn.
        private = getattr(self.optimizer, "private", None) is not None
        times = {"seconds": self.seconds, "processor_seconds": self.processor_seconds, "timed_steps": self.timed_steps}
        state.log_history[-1] |= {
            **({} if private else times),
            "forward_passes": self.optimizer.forward_passes,
            "sequences": self.optimizer.sequences_evaluated,
        }
