"""Callbacks of a run: :class:`StopOnSignal` ends it after a step, :class:`StepClock` adds times and forward passes to its log."""

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
            workers.stop_requested, self.stopping = self.asked, workers.stopping
        if self.stopping:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_a_loop = False


class StepClock(TrainerCallback):
    """Adds to the entries of `state.log_history`: ``seconds`` and ``processor_seconds`` within steps, ``forward_passes``, ``sequences``.

    The times are those of ``timed_steps`` steps. A resumed run goes on from the last entry of its checkpoint, and steps that follow a
    journal evaluate nothing, so that neither they nor the steps between entry and checkpoint are among them. On a machine that others
    use too, processor time says more of a step than a clock.

    Attributes:
        evaluation_seconds: of the evaluations since training began.
    """

    evaluation_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        last: dict[str, float] = next((entry for entry in reversed(state.log_history) if "processor_seconds" in entry), {})
        self.seconds, self.processor_seconds = last.get("seconds", 0.0), last.get("processor_seconds", 0.0)
        self.timed_steps = int(last.get("timed_steps", 0))
        self.optimizer: Any = None
        self.evaluation_seconds = 0.0

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        self.follows = bool(getattr(getattr(optimizer, "optimizer", optimizer), "tail", ()))
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        if not self.follows:
            self.timed_steps += 1
            self.seconds += time.perf_counter() - self._clock
            self.processor_seconds += time.process_time() - self._processor
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    def on_evaluate(self, args, state, control, metrics=None, **kwargs: Any) -> None:
        self.evaluation_seconds += (metrics or {}).get("eval_runtime", 0.0)

    def on_log(self, args, state, control, **kwargs: Any) -> None:
        if self.optimizer is None or not state.log_history:
            return
        state.log_history[-1] |= {
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "timed_steps": self.timed_steps,
            "forward_passes": self.optimizer.forward_passes,
            "sequences": self.optimizer.sequences_evaluated,
        }
