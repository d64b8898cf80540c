"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from zotune.io.text import metric_text
from zotune.training.guard import PREFIX

#: Columns of a terminal below which the bar leaves the forward passes out.
NARROW = 88


def rest_text(seconds: float) -> str:
    """`45` as `0:45`, `4000` as `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunProgress(TrainerCallback):
    """Shows step, loss (of a private run the ε spent), metric, steps per second, the expected rest of the run, and forward passes.

    Args:
        console: a terminal gets a bar, anything else a line at each evaluation and every tenth of the run.
        metric_name: metric of the evaluations, without its `eval_` prefix.
        first: its value before training.
    """

    def __init__(self, console: Console, metric_name: str, first: float | None = None):
        self.console = console
        self.metric_name = metric_name
        self.metric = first
        self.loss: float | None = None
        self.reward: float | None = None
        self.epsilon: tuple[float, int] | None = None  # of a private run, and the step that it had spent it at
        self.guard: dict[str, float] = {}
        self.forwards = 0
        self.bar: Progress | None = None
        self.rate: float | None = None
        self.left: float | None = None  # seconds

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self.first_step, self.started, self.paused = state.global_step, time.perf_counter(), 0.0
        if self.console.is_terminal:
            spare = self.console.width - 88  # columns beside the figures
            self.bar = Progress(
                BarColumn(bar_width=max(5, min(24, spare))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
            )
            self.job = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, facts="")
            self.bar.start()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.forwards = getattr(optimizer, "forward_passes", self.forwards)
        last = getattr(optimizer, "last_report", None)
        passed, done = time.perf_counter() - self.started, state.global_step - self.first_step
        self.rate = done / (passed - self.paused) if passed > self.paused else None
        self.left = passed / done * (state.max_steps - state.global_step) if done else None  # with as many evaluations as so far
        if self.bar is not None:
            if self.loss is None and last is not None and math.isfinite(last.loss) and state.global_step % 5 == 1:
                self.loss = float(last.loss)  # there is no mean before the first log entry
            self.bar.update(self.job, completed=state.global_step, facts=self._facts())
        elif state.global_step % max(1, state.max_steps // 10) == 0 and not control.should_evaluate:
            self._line(state)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss, self.reward = logs["loss"], logs.get("reward")
        if "epsilon" in logs:
            self.epsilon = logs["epsilon"], state.global_step
        self.guard.update({name: value for name, value in logs.items() if name.startswith(PREFIX) and name != f"{PREFIX}loss"})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs: Any) -> None:
        metrics = metrics or {}
        self.metric = metrics.get(f"eval_{self.metric_name}", self.metric)
        self.paused += metrics.get("eval_runtime", 0.0)  # steps per second are those of training
        if self.bar is not None:
            self.bar.update(self.job, facts=self._facts())
        else:
            self._line(state)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, state) -> None:
        self.console.print(f"step {state.global_step}/{state.max_steps}  {self._facts()}", highlight=False)

    def _facts(self) -> str:
        facts = []
        if self.reward is not None:
            facts.append(f"training reward {self.reward:.3f}")
        elif self.loss is not None:
            facts.append(f"loss {self.loss:.3f}")
        if self.epsilon is not None:
            facts.append("ε {:.3g} at step {}".format(*self.epsilon))
        if self.metric is not None:
            loss = self.metric_name == "loss"
            facts.append(f"eval loss {self.metric:.3f}" if loss else f"{self.metric_name} {metric_text(self.metric_name, self.metric)}")
        facts += [f"{name.replace('_', ' ')} {metric_text(name.removeprefix(PREFIX), value)}" for name, value in self.guard.items()]
        if self.rate is not None:
            facts.append(f"{self.rate:.1f} steps/s" if self.rate >= 1 else f"{1 / self.rate:.1f} s/step")
        if self.left:
            facts.append(f"{rest_text(self.left)} left")
        if self.bar is None or self.console.width >= NARROW:
            facts.append(f"{self.forwards} forwards")
        return "  ".join(facts)
