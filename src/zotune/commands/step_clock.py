"""What every log entry of a run should also say: the time within steps so far, and the forward passes."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Adds to the entries of `state.log_history`: ``seconds`` and ``processor_seconds`` within steps, ``forward_passes``, ``sequences``.

    The times are those of ``timed_steps`` steps. A resumed run goes on from the last entry of its checkpoint, and steps that follow a
    journal evaluate nothing, so that neither they nor the steps between entry and checkpoint are among them. On a machine that others
    use too, processor time says more of a step than a clock.
    """

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        last: dict[str, float] = next((entry for entry in reversed(state.log_history) if "processor_seconds" in entry), {})
        self.seconds, self.processor_seconds = last.get("seconds", 0.0), last.get("processor_seconds", 0.0)
        self.timed_steps = int(last.get("timed_steps", 0))
        self.optimizer: Any = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        self.follows = bool(getattr(getattr(optimizer, "optimizer", optimizer), "tail", ()))
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        if not self.follows:
            self.timed_steps += 1
            self.seconds += time.perf_counter() - self._clock
            self.processor_seconds += time.process_time() - self._processor
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

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
