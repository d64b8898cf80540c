"""One fine-tuning run as a function: :func:`run` loads data and model, evaluates, trains, evaluates, and writes a folder of results."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from zotune.baselines import Baseline
from zotune.io.lock import locked
from zotune.methods import Method
from zotune.optim.distributed import Workers, restarted
from zotune.rewards import Rewards
from zotune.rewards.evaluation import RewardMetrics
from zotune.tasks import PreparedData, prepare
from zotune.training import baseline_runs, predictions, run_file, run_folder
from zotune.training.arguments import ModelArguments
from zotune.training.attributed import attribute_data, write_rows
from zotune.training.callbacks import StepClock, StopOnSignal
from zotune.training.checkpoint import storage
from zotune.training.compatibility import check_engine, check_evaluations, check_kinds, check_request, under_scheme
from zotune.training.config import ZOConfig
from zotune.training.evaluation import measured, measured_with_output
from zotune.training.guard import Guard, guard_data
from zotune.training.loading import ModelPlan, check_texts, load_model, load_tokenizer, plan_model
from zotune.training.observer import RunObserver, RunResult, RunStart
from zotune.training.peak_memory import PeakMemory
from zotune.training.run_config import RunConfig
from zotune.training.run_record import RunRecord, dtype_of
from zotune.training.schemes import Scheme
from zotune.training.trainer import ZOTrainer
from zotune.weights import offload
from zotune.weights.computed_linear import is_computed
from zotune.weights.offload.budget import Needs

logger = logging.getLogger(__name__)

#: Predicts the memory of a step beside the weights, for `--max_memory`; None without that option.
NeedsPredictor = Callable[[ModelArguments, ModelPlan, ZOConfig, PreparedData, Method | Baseline, Scheme], Needs | None]


def run(config: RunConfig, observer: RunObserver | None = None, predict_needs: NeedsPredictor | None = None) -> RunResult:
    """Carries out one run: all checks first, what takes long last.

    Args:
        config: of the run.
        observer: receives its events.
        predict_needs: predicts the memory of a step beside the weights under ``max_memory`` (:func:`zotune.memory.offload_needs.needs_of`);
            None: a fixed share.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: an invalid request; nothing is written.
        NonFiniteLossError: training diverged.
        KeyboardInterrupt: interrupted; the message is the command that resumes the run.
    """
    return _Run(config, observer or RunObserver(), predict_needs).carry_out()


class _Run:
    """One run, from its configuration to a result."""

    def __init__(self, config: RunConfig, observer: RunObserver, predict_needs: NeedsPredictor | None):
        self.config, self.predict_needs = config, predict_needs
        self.training, self.folder = config.training, config.folder
        self.workers = Workers()
        self.guard: Guard | None = None
        self.attributed: PreparedData | None = None
        self.output: EvalLoopOutput | None = None  # of the last evaluation
        self.observer = observer if self.workers.first else RunObserver()  # the first process reports and writes the folder

    def carry_out(self) -> RunResult:
        config, training = self.config, self.training
        self._check_resumed(self._start()[0])
        method = training.chosen_method()
        for note in () if config.protocol is None else config.protocol.notes:
            logger.warning("%s.", note)
        check_request(config, method)
        rewards = Rewards(config.data.reward or (), training.reward_weights) if config.data.generates else None
        plan = plan_model(config.model, "zotune train")
        if plan.gguf is not None:
            check_engine(config, method)
        self.workers.from_first(partial(run_folder.check_sources, self.folder, self._sources(plan)))
        tokenizer = load_tokenizer(plan, config.model)
        parts = ("eval",) if isinstance(method, Baseline) and method.kind == "evaluate" else ("train", "eval")
        most = training.max_completion_length
        data = prepare(tokenizer, plan.config, seed=training.seed, parts=parts, max_completion_length=most, **config.data.of_prepare())
        if rewards is not None:
            data = dataclasses.replace(data, compute_metrics=RewardMetrics(rewards.names))
        self.attributed = attribute_data(tokenizer, plan.config, config.data, training.seed, training.attribute_examples, data)
        guarded = guard_data(tokenizer, plan.config, config.data, training.seed, masked=data.masked)
        check_evaluations(training, data, guarded=guarded is not None)
        check_kinds(config, data, guarded, plan.config)
        check_texts(plan, tokenizer, data)
        set_seed(training.seed)  # a new head or adapter draws from the global generator
        predict = self.predict_needs
        needs = None if predict is None else predict(config.model, plan, training, data, method, config.scheme)
        model, fresh = load_model(plan, config.model, training.device, kind=data.kind, needs=needs, identify=True)
        if fresh and config.scheme.scheme == "scales":
            raise ValueError("the model's head is randomly initialized, and --scheme scales does not train it: train it first.")
        if isinstance(method, Baseline) and method.kind != "backward":
            baseline_runs.check(method, config.scheme, data)
        else:
            model = under_scheme(model, config, method, fresh, on_adapter=plan.adapter is not None)
        existed = self.folder.exists()
        try:
            with self.workers.on_first(locked(self.folder)):
                resume, clear = self._start()  # another process may have worked in the folder since
                trainer = self._trainer(model, tokenizer, data)
                trainer.base, trainer.chats, trainer.model_files = plan.identity, data.chats, dict(data.files)
                self.guard = None if guarded is None else Guard(trainer, guarded)
                record = RunRecord(config, trainer, data, plan.adapter or plan.name, self.workers.size)
                if isinstance(method, Baseline) and method.kind != "backward":
                    summary = self._run_without_steps(method, trainer, data, clear, record)
                else:
                    summary = self._train(trainer, data, resume, clear, fresh, record)
        finally:
            if self.workers.first and not existed and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()  # it failed before anything was written
        result = RunResult(self.folder, summary, trainer.state.log_history)
        self.observer.finished(result)
        return result

    def _start(self) -> tuple[str | bool | None, bool]:
        """What to resume from, and whether to clear the folder; see :func:`run_folder.start_in`."""
        wanted, overwrite = self.training.resume_from_checkpoint, self.config.output.overwrite_output_dir
        again = restarted(self.folder)
        return tuple(self.workers.from_first(partial(run_folder.start_in, self.folder, wanted, overwrite=overwrite, restarted=again)))

    def _check_resumed(self, resume: str | bool | None) -> None:
        """ValueError for options that the run to resume does not have, before anything is loaded."""
        if resume is not None:
            run = run_file.parsed(run_folder.read_run(self.folder), self.folder / run_folder.RUN_FILE)
            run_file.check_options(self.folder / run_folder.RUN_FILE, run, self.config)

    def _sources(self, plan: ModelPlan) -> list[str | Path | None]:
        """The files and folders that the run reads."""
        data = self.config.data
        files = None if data.data_dir is None or data.task is None else Path(data.data_dir) / data.task
        return [
            plan.name,
            plan.adapter,
            self.config.model.model_name_or_path,
            data.train_file,
            data.eval_file,
            data.guard_file,
            data.attribute,
            data.task,
            files,
            data.dataset_name if data.dataset_name is not None and Path(data.dataset_name).is_dir() else None,
        ]

    def _trainer(self, model: nn.Module, tokenizer: Any, data: PreparedData) -> ZOTrainer:
        try:
            trainer = ZOTrainer(
                model=model,
                args=self.training,
                **data.optimized(self.config.data.reward),
                train_dataset=data.train,
                eval_dataset=data.dev or data.eval,
                data_collator=data.collate_train,
                eval_data_collator=data.collate_eval,
                compute_metrics=data.compute_metrics,
                processing_class=tokenizer if data.processor is None else data.processor,
                attribute_dataset=None if self.attributed is None else self.attributed.train,
            )
        except RuntimeError as error:
            if "requires" not in str(error):  # a logger of --report_to that is not installed
                raise
            raise ValueError(f"--report_to: {error}") from error
        trainer.remove_callback(PrinterCallback)
        trainer.on_completions = self.observer.completions
        return trainer

    def _train(
        self, trainer: ZOTrainer, data: PreparedData, resume: str | bool | None, clear: bool, fresh: list[str], record: RunRecord
    ) -> dict[str, Any]:
        begin = time.perf_counter()
        memory = PeakMemory(self.training.device)
        title = self.training.chosen_method().title
        self._report_start(trainer, data, title, record)
        if resume is None:
            before = self._evaluate(trainer, data, "before training")
            if self.workers.first:
                if clear:
                    run_folder.clear_run(self.folder)
                record.start(fresh, before)
                predictions.write_before(self.folder, self.output)
                if self.attributed is not None and data.train_rows is not None:
                    write_rows(self.folder, data.train_rows)
                trainer.log_completions()
            self.workers.wait()
        else:
            before = record.resume()
            self.workers.wait()
            record.restore_head()
        peak_before = memory.peak()
        seconds = self._loop(trainer, resume, self.observer.callbacks(data.main_metric, (before or {}).get(data.main_metric)))
        peaks = memory.summary(evaluation=peak_before)
        after = self._evaluate(trainer, data, "after training")
        trainer.log_completions()
        held_out = None if data.dev is None else self._on_held_out(trainer, data)
        summary = record.summary(before, after, time.perf_counter() - begin, peaks, seconds=seconds) | {"held_out": held_out}
        if self.workers.first:
            predictions.write_after(self.folder, self.output, data)
            record.save_model()
            record.write_summary(summary, curve_title=title)
        self.workers.wait()
        return summary

    def _loop(self, trainer: ZOTrainer, resume: str | bool | None, callbacks: Any) -> float:
        """Trains; the seconds without those of evaluations."""
        clock, stop = StepClock(), StopOnSignal()
        guard = () if self.guard is None else (self.guard,)
        for callback in (*guard, *callbacks, clock, stop):  # `stop` last: the others see the step after which it raises
            trainer.add_callback(callback)
        started, before = time.perf_counter(), 0.0 if self.guard is None else self.guard.seconds
        try:
            with stop.listening():
                trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._interrupted()) from None
        finally:
            self.observer.stopped()
        guarding = 0.0 if self.guard is None else self.guard.seconds - before
        return time.perf_counter() - started - clock.evaluation_seconds - guarding

    def _run_without_steps(
        self, method: Baseline, trainer: ZOTrainer, data: PreparedData, clear: bool, record: RunRecord
    ) -> dict[str, Any]:
        """A baseline without steps: zero-shot, in-context learning, a linear probe."""
        begin = time.perf_counter()
        memory = PeakMemory(self.training.device)
        self._report_start(trainer, data, method.title, record)
        before = self._evaluate(trainer, data, "with demonstrations" if method.name == "icl" else "before training")
        assert before is not None, "there is something to evaluate on"
        if clear:
            run_folder.clear_run(self.folder)
        record.start([], before)
        after, fit = before, {"loss": None, "forward_passes": 0, "sequences_evaluated": 0, "seconds": 0.0}
        peak_before = memory.peak()
        if method.kind == "fit":
            after, fit = baseline_runs.linear_probe(method, trainer, data, self.folder)
            self.observer.evaluated("with the probe", data.main_metric, after[data.main_metric])
        peaks = memory.summary(evaluation=peak_before)
        first = None if method.name == "icl" else before
        summary = record.summary(first, after, time.perf_counter() - begin, peaks, fit=fit)
        if method.kind == "fit":
            summary["files"]["model"] = str(self.folder / run_folder.PROBE_FILE)
        record.write_summary(summary)
        return summary

    def _report_start(self, trainer: ZOTrainer, data: PreparedData, title: str, record: RunRecord) -> None:
        model, stream = trainer.model, offload.stream_of(trainer.model)
        sizes = {"to train on": len(data.train or [])}
        sizes |= {name: len(part) for name, part in (("held out", data.dev), ("to evaluate on", data.eval)) if part}
        parameters, precision = self._weights(model)
        self.observer.begin(
            RunStart(
                method=title,
                model=record.base,
                trainable=record.trainable(),
                parameters=parameters,
                dtype=precision,
                device=str(self.training.device),
                data=self.config.name_of_data,
                sizes=sizes,
                offload=None if stream is None else stream.describe(),
            )
        )

    def _weights(self, model: nn.Module) -> tuple[int, str]:
        """Number of a model's weights, and their precision."""
        if not is_computed(model):
            return sum(p.numel() for p in model.parameters()), dtype_of(model)
        from zotune.training import gguf_models

        return gguf_models.elements(cast(Any, model)), f"{gguf_models.quantization(cast(Any, model))}, by llama.cpp"

    def _evaluate(self, trainer: ZOTrainer, data: PreparedData, when: str) -> dict[str, float] | None:
        """Metrics on the evaluation data; None where there are none."""
        if data.eval is None:
            return None
        metrics, self.output = measured_with_output(trainer, data.eval)
        self.observer.evaluated(when, data.main_metric, metrics[data.main_metric])
        if self.guard is not None:
            metrics |= self.guard.metrics()
            self.observer.evaluated(when, self.guard.main_metric, metrics[self.guard.main_metric])
        return metrics

    def _on_held_out(self, trainer: ZOTrainer, data: PreparedData) -> dict[str, float]:
        """Metrics of the trained model on the held-out part; from the log where its last evaluation was at the last step."""
        last: dict[str, float] = next((e for e in reversed(trainer.state.log_history) if f"eval_{data.main_metric}" in e), {})
        if last.get("step") != trainer.state.global_step or self.training.load_best_model_at_end:
            return measured(trainer, data.dev)
        metrics = {name.removeprefix("eval_"): float(value) for name, value in last.items() if name.startswith("eval_")}
        for name in ("runtime", "samples_per_second", "steps_per_second"):
            metrics.pop(name, None)
        return {"loss": metrics.pop("loss"), **metrics} if "loss" in metrics else metrics

    def _interrupted(self) -> str:
        found = storage.checkpoints(self.folder)
        command = run_folder.resume_command(self.config.words)
        if not found:
            return f"Interrupted before the first checkpoint. Start again with: {command}"
        return f"Interrupted; {found[0]} is complete. Continue with: {command}"
