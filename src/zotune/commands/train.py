"""`zotune train`: data, zero-shot evaluation, training, evaluation, and what is left in the run folder."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, set_seed

from zotune import checkpoint, offloading, schemes
from zotune.commands import run_folder, untrained
from zotune.commands.arguments import DataArguments, ModelArguments
from zotune.commands.foreseen import needs_of
from zotune.commands.models import load_model, load_tokenizer, plan_model
from zotune.commands.parser import CommandParser
from zotune.commands.progress import RunProgress
from zotune.commands.quiet import quiet_libraries
from zotune.commands.step_clock import StepClock
from zotune.commands.stopping import StopWhenAsked
from zotune.commands.train_options import ABOUT, DEFAULTS, USAGE, OutputArguments, groups
from zotune.config import ZOConfig, settings
from zotune.distributed import Workers, restarted
from zotune.first_order import FirstOrder, Rival
from zotune.methods import Method
from zotune.quantised import dequantise
from zotune.run_lock import locked
from zotune.run_report import (
    PeakMemory,
    curve_of,
    duration_text,
    memory_text,
    metric_text,
    summary_table,
    write_curve,
    write_json,
)
from zotune.schemes import Scheme
from zotune.tasks import PreparedData, prepare
from zotune.trainer import ZOTrainer
from zotune.whole_file import whole_file


def main(argv: Sequence[str]) -> int:
    """Runs `zotune train`."""
    quiet_libraries()
    parser = CommandParser((ModelArguments, DataArguments, Scheme, OutputArguments, ZOConfig), "zotune train", DEFAULTS)
    resume = parser.option("resume_from_checkpoint")
    resume.nargs, resume.const = "?", "true"
    if {"-h", "--help", "--help-all"} & set(argv):
        everything = "--help-all" in argv
        print(parser.help_page(USAGE, ABOUT, groups(), everything=everything))
        if not everything:
            print("\n`zotune train --help-all` lists every option, those of transformers.TrainingArguments among them.")
        return 0
    (model, data, scheme, output, config), _ = parser.parse(argv, _adjust)
    run = Run(argv, model, data, scheme, output, config)
    summary = run.carry_out()
    run.console.print(report(summary))
    return 0


def _adjust(values: dict[str, Any], given: set[str]) -> None:
    """What must be settled before ZOConfig looks at its fields."""
    if not values["output_dir"]:
        raise ValueError("zotune train needs --output_dir: the folder to put the run in.")
    if values["load_best_model_at_end"] and "save_steps" not in given and "save_strategy" not in given:
        values["save_steps"] = values["eval_steps"]  # the best evaluation needs its checkpoint


class Run:
    """One `zotune train`, from options to a summary."""

    def __init__(
        self,
        argv: Sequence[str],
        model: ModelArguments,
        data: DataArguments,
        scheme: Scheme,
        output: OutputArguments,
        config: ZOConfig,
        console: Console | None = None,
        name: str | None = None,
    ):
        self.argv, self.model_args, self.data_args = list(argv), model, data
        self.scheme, self.output, self.config = scheme, output, config
        self.folder = Path(config.output_dir)
        self.workers = Workers()  # the first of several speaks, and writes the folder
        self.console = console or new_console(quiet=not self.workers.first)
        self.data_name = name or data.task or Path(data.train_file or "").name

    def carry_out(self) -> dict[str, Any]:
        """Everything, in order: what can be wrong first, what takes long last. Returns the summary.

        Raises:
            ValueError, FileNotFoundError, FileExistsError: a wrong request; nothing has been written then.
            NonFiniteLossError: training diverged.
            KeyboardInterrupt: interrupted, with the command that continues the run as its message.
        """
        resume, self.output.overwrite_output_dir = self.workers.from_first(self._resume)
        if resume is None and not self.output.overwrite_output_dir:
            self.workers.from_first(lambda: run_folder.check_unused(self.folder, "zotune train"))
        method = self.config.chosen_method()
        self._settle_demonstrations(method)
        self._check_scales()
        plan = plan_model(self.model_args, "zotune train")
        tokenizer = load_tokenizer(plan, self.model_args)
        parts = ("eval",) if isinstance(method, Rival) and method.kind == "evaluate" else ("train", "eval")
        data = prepare(tokenizer, plan.config, seed=self.config.seed, parts=parts, **dataclasses.asdict(self.data_args))
        set_seed(self.config.seed)  # a new head or adapter is drawn from the global generator
        classes = data.label_names if data.train_objective == "classifier" else None
        needs = needs_of(self.model_args, plan, self.config, data, method, self.scheme)
        model, fresh = load_model(plan, self.model_args, self.config.device, classes=classes, needs=needs)
        if fresh and self.scheme.scheme == "scales":
            raise ValueError("the model's head is drawn at random, and under --scheme scales its numbers would stay so: train it first.")
        no_steps = isinstance(method, Rival) and method.kind != "backward"
        if no_steps:
            assert isinstance(method, Rival)
            untrained.check(method, self.scheme, data)
        else:
            model = self._under_scheme(model, method, on_adapter=plan.adapter is not None)
        existed = self.folder.exists()
        try:
            with self.workers.on_first(locked(self.folder)):
                trainer = self._trainer(model, tokenizer, data)
                if no_steps:
                    assert isinstance(method, Rival)
                    return self._judge(method, trainer, data, base=plan.adapter or plan.name)
                return self._train(trainer, data, resume, fresh, base=plan.adapter or plan.name)
        finally:
            if self.workers.first and not existed and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()  # it failed before there was anything to keep

    def _resume(self) -> tuple[str | bool | None, bool]:
        """What to resume from, and whether to replace what is in the folder."""
        wanted, overwrite = self.config.resume_from_checkpoint, self.output.overwrite_output_dir
        if wanted is None and restarted():  # a worker died, and torchrun has started all of them again with the same words
            begun = (self.folder / run_folder.RUN_FILE).is_file() and (self.folder / run_folder.JOURNAL_FILE).is_file()
            return (True if begun else None), True
        if wanted is None or wanted.lower() in ("false", "no"):
            return None, overwrite
        run_folder.read_run(self.folder)
        return (True if wanted.lower() in ("true", "yes") else wanted), overwrite

    def _settle_demonstrations(self, method: Method | Rival) -> None:
        if method.name == "icl":
            if self.data_args.num_demonstrations is None:
                self.data_args.num_demonstrations = untrained.DEMONSTRATIONS
        elif self.data_args.num_demonstrations is not None:
            raise ValueError(f"--num_demonstrations is an option of --method icl, not of {method.name}.")

    def _check_scales(self) -> None:
        """ValueError for what `--scheme scales` cannot be put together with."""
        if self.scheme.scheme != "scales":
            return
        if self.model_args.quantize != "int8":
            have = "" if self.model_args.quantize is None else ", where a row has one; in int4 they are inside the product"
            raise ValueError(f"--scheme scales moves the scales of layers held in 8 bits{have}: it needs --quantize int8.")
        if self.model_args.offload != "no":
            raise ValueError("--scheme scales writes scales that stay in memory with their layers: leave --offload out.")

    def _under_scheme(self, model: nn.Module, method: Method | Rival, *, on_adapter: bool) -> nn.Module:
        """The model with what the scheme trains; a folder that holds an adapter goes on training that."""
        if on_adapter:
            if self.scheme.scheme in ("head", "bias", "scales") or self.scheme.trainable:
                raise ValueError("the model folder holds an adapter, and training goes on with that: leave --scheme and --trainable out.")
        else:
            model = schemes.apply(model, self.scheme, seed=self.config.seed)
        if self.scheme.scheme == "prefix" and self.config.activation_checkpointing:
            raise ValueError("prefix tuning keeps its keys and values where activation checkpointing drops them: leave one of them out.")
        reason = schemes.refusal(method, model, self.scheme) or (
            offloading.refusal(method, model) if self.model_args.offload != "no" else None
        )
        if reason is not None:
            raise ValueError(reason)
        return model

    def _trainer(self, model: nn.Module, tokenizer: Any, data: PreparedData) -> ZOTrainer:
        if data.dev is None and data.eval is None:
            self.config.eval_strategy = "no"  # type: ignore[assignment]
        try:
            trainer = ZOTrainer(
                model=model,
                args=self.config,
                objective=data.train_objective,
                eval_objective=data.eval_objective,
                train_dataset=data.train,
                eval_dataset=data.dev or data.eval,
                data_collator=data.collate_train,
                eval_data_collator=data.collate_eval,
                compute_metrics=data.compute_metrics,
                processing_class=tokenizer,
            )
        except RuntimeError as error:
            if "requires" not in str(error):  # a logger of --report_to that is not installed
                raise
            raise ValueError(f"--report_to: {error}") from error
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _train(self, trainer: ZOTrainer, data: PreparedData, resume: str | bool | None, fresh: list[str], base: str) -> dict[str, Any]:
        begin = time.perf_counter()
        memory = PeakMemory(self.config.device)
        method = self.config.chosen_method()
        self._announce(trainer, data, method.title, base)
        if resume is None:
            before = self._evaluate(trainer, data, "before training")
            if self.workers.first:
                if self.output.overwrite_output_dir:
                    run_folder.clear_run(self.folder)
                self._note_start(trainer, data, fresh, base, before)
            self.workers.wait()
        else:
            before = run_folder.read_run(self.folder).get("before")
            self._restore_head(trainer.model)
        peak_before = memory.peak()
        progress = RunProgress(self.console, data.main_metric, (before or {}).get(data.main_metric))
        trainer.add_callback(progress)
        trainer.add_callback(StepClock())
        stop = StopWhenAsked()
        trainer.add_callback(stop)  # the last one: the others have seen the step that it ends
        started = time.perf_counter()
        try:
            with stop.listening():
                trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._how_to_go_on()) from None
        finally:
            progress.close()
        seconds = time.perf_counter() - started - progress.paused
        peaks: dict[str, int | str] = {"loaded": memory.baseline, "evaluation": peak_before, "training": memory.peak(), "of": memory.kind}
        after = self._evaluate(trainer, data, "after training")
        held_out = None if data.dev is None else self._on_held_out(trainer, data)
        summary = self._summary(trainer, data, before, after, seconds, time.perf_counter() - begin, peaks) | {"held_out": held_out}
        if self.workers.first:
            self._save(trainer)
            self._write_summary(trainer, data, before, after, summary, method.title)
        self.workers.wait()
        return summary

    def _write_summary(
        self,
        trainer: ZOTrainer,
        data: PreparedData,
        before: Mapping[str, float] | None,
        after: Mapping[str, float] | None,
        summary: Mapping[str, Any],
        title: str,
    ) -> None:
        write_json(self.folder / run_folder.HISTORY_FILE, {"entries": trainer.state.log_history})
        write_json(self.folder / run_folder.SUMMARY_FILE, summary)
        first = (before or {}).get(data.main_metric) if data.dev is None else None
        curve = curve_of(trainer.state.log_history, data.main_metric, first)
        if data.dev is None and after is not None:
            curve = dataclasses.replace(
                curve, metric=sorted({**dict(curve.metric), trainer.state.global_step: after[data.main_metric]}.items())
            )
        write_curve(curve, self.folder / run_folder.CURVE_FILE, f"{title} on {self.data_name}")

    def _judge(self, method: Rival, trainer: ZOTrainer, data: PreparedData, base: str) -> dict[str, Any]:
        """A method that takes no step: zero-shot, in-context learning, a linear probe."""
        begin = time.perf_counter()
        memory = PeakMemory(self.config.device)
        self._announce(trainer, data, method.title, base)
        before = self._evaluate(trainer, data, "with demonstrations" if method.name == "icl" else "before training")
        assert before is not None, "there is something to evaluate on"
        if self.output.overwrite_output_dir:
            run_folder.clear_run(self.folder)
        after, counts = before, {"loss": None, "forward_passes": 0, "sequences_evaluated": 0, "seconds": 0.0}
        peak_before = memory.peak()
        if method.kind == "fit":
            after, counts = untrained.probed(method, trainer, data, self.folder)
            self.console.print(f"with the probe: {data.main_metric} {metric_text(data.main_metric, after[data.main_metric])}")
        self._note_start(trainer, data, [], base, before)
        peaks: dict[str, int | str] = {"loaded": memory.baseline, "evaluation": peak_before, "training": memory.peak(), "of": memory.kind}
        summary = self._facts(trainer, data) | {
            "before": None if method.name == "icl" else before,
            "after": after,
            "loss": {"first": None, "last": counts["loss"]},
            "learning_rate": None,
            "first_learning_rate": None,
            "eps": None,
            "steps": 0,
            "forward_passes": counts["forward_passes"],
            "sequences_evaluated": counts["sequences_evaluated"],
            "training_seconds": counts["seconds"],
            "total_seconds": time.perf_counter() - begin,
            "memory": peaks,
            "files": {"summary": str(self.folder / run_folder.SUMMARY_FILE), "checkpoints": []},
        }
        if method.kind == "fit":
            summary["files"]["model"] = str(self.folder / run_folder.PROBE_FILE)
        write_json(self.folder / run_folder.SUMMARY_FILE, summary)
        return summary

    # -- parts ---------------------------------------------------------------------------------------------------

    def _announce(self, trainer: ZOTrainer, data: PreparedData, method: str, base: str) -> None:
        moving = self._facts(trainer, data)["trainable_parameters"]
        whole = sum(p.numel() for p in trainer.model.parameters())
        dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
        sizes = [f"{len(data.train or [])} to train on"]
        sizes += [f"{len(part)} {name}" for name, part in (("held out", data.dev), ("to evaluate on", data.eval)) if part]
        self.console.print(
            f"{method}: {base}, {moving / 1e6:.3g} M of {whole / 1e6:.3g} M parameters move, {dtype} on {self.config.device}",
            highlight=False,
        )
        self.console.print(f"{self.data_name}: {', '.join(sizes)}", highlight=False)
        stream = offloading.stream_of(trainer.model)
        if stream is not None:
            self.console.print(stream.describe(), highlight=False)

    def _evaluate(self, trainer: ZOTrainer, data: PreparedData, when: str) -> dict[str, float] | None:
        """Metrics on the evaluation data (not the held-out part), without their `eval_` prefix."""
        if data.eval is None:
            return None
        metrics = evaluate_quietly(trainer, data.eval)
        self.console.print(f"{when}: {data.main_metric} {metric_text(data.main_metric, metrics[data.main_metric])}")
        return metrics

    def _on_held_out(self, trainer: ZOTrainer, data: PreparedData) -> dict[str, float]:
        """Metrics of the trained model on the held-out part; those of the log where the last evaluation was at the last step."""
        last: dict[str, float] = next((e for e in reversed(trainer.state.log_history) if f"eval_{data.main_metric}" in e), {})
        if last.get("step") != trainer.state.global_step or self.config.load_best_model_at_end:
            return evaluate_quietly(trainer, data.dev)
        names = ("loss", *(name.removeprefix("eval_") for name in last if name.startswith("eval_")))
        unwanted = ("runtime", "samples_per_second", "steps_per_second")
        return {name: float(last[f"eval_{name}"]) for name in dict.fromkeys(names) if f"eval_{name}" in last and name not in unwanted}

    def _note_start(
        self,
        trainer: ZOTrainer,
        data: PreparedData,
        fresh: list[str],
        base: str,
        before: dict[str, float] | None,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:  # the base model's files lack these: without them the journal could not be replayed
            weights = dict(trainer.model.named_parameters())
            head = {
                name: weight.detach().cpu().contiguous() for name, weight in weights.items() if any(name.endswith(key) for key in fresh)
            }
            with whole_file(self.folder / run_folder.HEAD_FILE) as partial:
                save_file(head, partial)
        run_folder.write_run(
            self.folder,
            {
                "format": 1,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": shlex.join(["zotune", "train", *self.argv]),
                "working_directory": str(Path.cwd()),
                "base_model": base,
                "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
                "classes": list(data.label_names) if data.train_objective == "classifier" else None,
                "metric": data.main_metric,
                "before": before,
                "model_arguments": dataclasses.asdict(self.model_args),
                "data_arguments": _absolute(dataclasses.asdict(self.data_args)),
                "scheme": dataclasses.asdict(self.scheme),
                "training_arguments": settings(self.config),
                "versions": run_folder.versions(),
            },
        )

    def _restore_head(self, model: nn.Module) -> None:
        path = self.folder / run_folder.HEAD_FILE
        if path.is_file():
            model.load_state_dict(load_file(path), strict=False)

    def _how_to_go_on(self) -> str:
        found = checkpoint.checkpoints(self.folder)
        if not found:
            return f"Interrupted before the first checkpoint. Begin again with: {run_folder.resume_command(self.argv)}"
        return f"Interrupted; {found[0]} is complete. Continue with: {run_folder.resume_command(self.argv)}"

    def _save(self, trainer: ZOTrainer) -> None:
        draft = self.folder / ".model.partial"
        checkpoint.remove_drafts(self.folder)
        try:
            dequantise(trainer.model)  # ordinary weights, which transformers loads
            trainer.save_model(str(draft))
            run_folder.publish(draft, self.folder)
        except BaseException:  # a full disk: no half model, and room for what is saved next
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _summary(
        self,
        trainer: ZOTrainer,
        data: PreparedData,
        before: Mapping[str, float] | None,
        after: Mapping[str, float] | None,
        seconds: float,
        total: float,
        peaks: Mapping[str, int | str],
    ) -> dict[str, Any]:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        optimizer = trainer.zo_optimizer
        assert optimizer is not None, "training has made one"
        files = {
            "model": str(self.folder),
            "journal": str(self.folder / run_folder.JOURNAL_FILE),
            "curve": str(self.folder / run_folder.CURVE_FILE),
            "summary": str(self.folder / run_folder.SUMMARY_FILE),
            "checkpoints": [str(path) for path in checkpoint.checkpoints(self.folder)],
        }
        if isinstance(optimizer, FirstOrder):
            del files["journal"]
        return self._facts(trainer, data) | {
            "before": before,
            "after": after,
            "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
            "learning_rate": self.config.learning_rate,
            "first_learning_rate": next((e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e), None),
            "eps": optimizer.eps,
            "steps": trainer.state.global_step,
            # Of a first-order method: what its passes cost in forward passes (a backward pass counts as two).
            "forward_passes": optimizer.forward_passes,
            "sequences_evaluated": optimizer.sequences_evaluated,
            "training_seconds": seconds,
            "total_seconds": total,
            # Bytes: with the model and the data loaded, at the peak of the evaluation before training, at the peak of training.
            "memory": dict(peaks),
            "files": files,
        }

    def _facts(self, trainer: ZOTrainer, data: PreparedData) -> dict[str, Any]:
        """What a summary says of the request."""
        method = self.config.chosen_method()
        moves = not isinstance(method, Rival) or method.kind == "backward"
        return {
            "method": method.name,
            "method_options": method.options,
            "scheme": self.scheme.scheme,
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) if moves else 0,
            "model": self.model_args.model_name_or_path,
            "data": self.data_name,
            "metric": data.main_metric,
            "batch_size": trainer.get_total_train_batch_size(self.config),
            "processes": self.workers.size,
            "seed": self.config.seed,
            "output_dir": str(self.folder),
        }


def evaluate_quietly(trainer: ZOTrainer, examples: Any) -> dict[str, float]:
    """Metrics on encoded examples without their prefix, outside of the trainer's log and callbacks."""
    loader = trainer.get_eval_dataloader(examples)
    result = trainer.evaluation_loop(loader, "evaluation", prediction_loss_only=None)
    assert result.metrics is not None, "the loop always measures"
    metrics = {name.removeprefix("eval_"): float(value) for name, value in result.metrics.items()}
    metrics.pop("model_preparation_time", None)  # Hugging Face's, of no interest
    return metrics


def report(summary: Mapping[str, Any]) -> Any:
    """The closing table of a run."""
    metric = summary["metric"]
    rows = []
    if summary["before"] and summary["after"]:
        change = f"{metric_text(metric, summary['before'][metric])} → {metric_text(metric, summary['after'][metric])}"
        rows.append((metric, change))
    elif summary["after"]:
        rows.append((metric, metric_text(metric, summary["after"][metric])))
    loss, memory = summary["loss"], summary["memory"]
    if loss["last"] is not None:  # a run shorter than --logging_steps logs none
        change = " → ".join(metric_text("loss", value) for value in dict.fromkeys((loss["first"], loss["last"])) if value is not None)
        rows.append(("training loss", change))
    if summary["steps"]:
        rows.append(("steps", f"{summary['steps']} of {summary['batch_size']} examples, learning rate {_rate_text(summary)}"))
    rows += [
        ("forward passes", f"{summary['forward_passes']} ({summary['sequences_evaluated']} sequences)"),
        ("time", f"{duration_text(summary['training_seconds'])} of training"),
        ("peak memory", f"{memory_text(memory['training'])} ({memory['of']}; {memory_text(memory['loaded'])} before the first forward)"),
    ]
    rows += [(name, summary["files"][name]) for name in ("model", "journal", "curve", "summary") if name in summary["files"]]
    return summary_table(rows, f"{summary['method']} on {summary['data']}")


def _rate_text(summary: Mapping[str, Any]) -> str:
    rate, first = summary["learning_rate"], summary["first_learning_rate"]
    if not isinstance(rate, str):
        return f"{rate:g}"
    return rate if first is None else f"{rate} ({first:.2g} at the first log entry)"


def new_console(quiet: bool = False) -> Console:
    """Standard output; wide enough for a path where there is no terminal to ask."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=120, quiet=quiet)


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """Data options whose paths hold from any folder, for a later `zotune eval` of the run."""
    for name in ("data_dir", "train_file", "eval_file"):
        if data[name] is not None:
            data[name] = str(Path(data[name]).expanduser().resolve())
    if data["task"] and data["task"].endswith((".yaml", ".yml")):
        data["task"] = str(Path(data["task"]).resolve())
    return data
