"""The files of a run: :class:`RunRecord`."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from zotune.baselines import Baseline, FirstOrder
from zotune.io.atomic import whole_file
from zotune.io.json_files import write_json
from zotune.io.lock import check_in_place
from zotune.tasks import PreparedData
from zotune.training import resume_rules, run_file, run_folder
from zotune.training.adapters import base_name
from zotune.training.checkpoint import storage
from zotune.training.completions import COMPLETIONS_FILE
from zotune.training.curve import curve_of, write_curve
from zotune.training.run_config import RunConfig
from zotune.training.trainer import ZOTrainer
from zotune.weights.trainable_scales import dequantize

Metrics = Mapping[str, float]


class RunRecord:
    """Writes the files of one run.

    Args:
        config, trainer, data: of the run.
        base: absolute folder or hub id of the base model.
        processes: number of processes.
    """

    def __init__(self, config: RunConfig, trainer: ZOTrainer, data: PreparedData, base: str, processes: int):
        self.config, self.trainer, self.data, self.base, self.processes = config, trainer, data, base, processes
        self.folder = config.folder
        self.resumed: list[dict[str, Any]] = []  # resumptions with other options

    def start(self, fresh: Sequence[str], before: Metrics | None) -> None:
        """Writes `zotune_run.json`, before all else, and the randomly initialized parameters, which a replay needs.

        Args:
            fresh: names of the parameters that the model's files lack.
            before: metrics before training.
        """
        check_in_place(self.folder)
        examples = run_file.examples_of(self.data.train, self.trainer.private_key(new=True) if self.trainer.private else None)
        write_json(
            self.folder / run_folder.RUN_FILE,
            {
                "format": storage.FORMAT,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": shlex.join(["zotune", "train", *self.config.words]),
                "working_directory": str(Path.cwd()),
                "base_model": self.base,
                "base": None if self.trainer.base is None else dataclasses.asdict(self.trainer.base),
                "dtype": dtype_of(self.trainer.model),
                "classes": list(self.data.label_names) if self.data.train_objective == "classifier" else None,
                "masked": self.data.masked,
                "kind": self.data.kind.to_record(),
                "chats": self.data.chats,
                "metric": self.data.main_metric,
                "before": before,
                "batch": dataclasses.asdict(self.trainer.batch_by_options()),
                "examples": None if examples is None else dataclasses.asdict(examples),
                "protocol": self._protocol(),
                **run_file.options_of(self.config),
                "versions": run_folder.versions(),
            },
        )
        if self.data.task_file is not None:
            with whole_file(self.folder / run_folder.TASK_FILE) as partial:
                partial.write_text(yaml.safe_dump(dict(self.data.task_file), sort_keys=False, allow_unicode=True), encoding="utf-8")
        if fresh:
            weights = {name: weight for name, weight in self.trainer.model.named_parameters() if base_name(name) in set(fresh)}
            head = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
            with whole_file(self.folder / run_folder.HEAD_FILE) as partial:
                save_file(head, partial)

    def resume(self) -> dict[str, Any] | None:
        """Compares the run with `zotune_run.json`, which gets the options that changed; the metrics before training.

        Raises:
            ValueError: the base model, the training examples or the size of a batch are not those of the run.
        """
        path = self.folder / run_folder.RUN_FILE
        content = run_folder.read_run(self.folder)
        run = run_file.parsed(content, path)
        run_file.check_base(path, run, self.trainer.base)
        key = self.trainer.private_key(new=False) if self.trainer.private else None
        run_file.check_examples(path, run, run_file.examples_of(self.data.train, key), self.config)
        if run.batch is not None:
            resume_rules.micro_batch(path, run.batch, self.trainer.batch_by_options(), self.processes)
        changed = run_file.changes(run, self.config)
        self.resumed = [dataclasses.asdict(each) for each in run.resumed]
        if changed:
            when, command = datetime.now(UTC).isoformat(timespec="seconds"), shlex.join(["zotune", "train", *self.config.words])
            self.resumed.append({"when": when, "command": command, "changed": changed})
            if self.trainer.workers.first:
                write_json(path, {**content, **run_file.options_of(self.config), "resumed": self.resumed})
        return run.before

    def restore_head(self) -> None:
        """Loads the randomly initialized parameters that the run began with."""
        path = self.folder / run_folder.HEAD_FILE
        if path.is_file():
            self.trainer.model.load_state_dict(load_file(path), strict=False)

    def save_model(self) -> None:
        """Writes the trained model: all of its files or none."""
        check_in_place(self.folder)
        draft = self.folder / ".model.partial"
        storage.remove_drafts(self.folder)
        try:
            dequantize(self.trainer.model)  # weights that transformers loads
            self.trainer.save_model(str(draft))
            run_folder.publish(draft, self.folder)
        except BaseException:  # such as a full disk
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def write_summary(self, summary: Mapping[str, Any], *, curve_title: str | None = None) -> None:
        """Writes `summary.json`, which says that the run has ended, and before it, with a title, the history and the curve."""
        check_in_place(self.folder)
        if curve_title is not None:
            self._write_history(summary, curve_title)
        write_json(self.folder / run_folder.SUMMARY_FILE, summary)

    def _write_history(self, summary: Mapping[str, Any], curve_title: str) -> None:
        history, metric = self.trainer.state.log_history, self.data.main_metric
        write_json(self.folder / run_folder.HISTORY_FILE, {"entries": history})
        before, after = summary["before"], summary["after"]
        curve = curve_of(history, metric, (before or {}).get(metric) if self.data.dev is None else None)
        if self.data.dev is None and after is not None:
            curve.metric = sorted({**dict(curve.metric), self.trainer.state.global_step: after[metric]}.items())
        write_curve(curve, self.folder / run_folder.CURVE_FILE, f"{curve_title} on {self.config.name_of_data}")

    def summary(
        self,
        before: Metrics | None,
        after: Metrics | None,
        total: float,
        memory: Mapping[str, int | str],
        *,
        seconds: float = 0.0,
        fit: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The contents of `summary.json`.

        Args:
            before, after: metrics before and after training.
            total: seconds of the run.
            memory: bytes with model and data loaded, at the peak of the evaluation before training, at the peak of training.
            seconds: of training.
            fit: of a baseline without steps: its loss, forward_passes, sequences_evaluated and seconds; None: the run trained.
        """
        config, history = self.config, self.trainer.state.log_history
        method = config.training.chosen_method()
        files = {"summary": run_folder.SUMMARY_FILE}
        if fit is None:
            optimizer = self.trainer.zo_optimizer
            losses = [entry["loss"] for entry in history if "loss" in entry]
            journal = {} if isinstance(optimizer, FirstOrder) else {"journal": run_folder.JOURNAL_FILE}
            shown = {"completions": COMPLETIONS_FILE} if (self.folder / COMPLETIONS_FILE).is_file() else {}
            files = {"model": "", **journal, "curve": run_folder.CURVE_FILE, **shown, **files}
            figures: dict[str, Any] = {
                "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
                "learning_rate": config.training.learning_rate,
                "first_learning_rate": next((e["learning_rate"] for e in history if "learning_rate" in e), None),
                "eps": optimizer.eps,
                "steps": self.trainer.state.global_step,
                **({"privacy": self.trainer.spent()} if self.trainer.private else {}),
                # Of a first-order method: the cost of its passes in forward passes (a backward pass counts as two).
                "forward_passes": optimizer.forward_passes,
                "sequences_evaluated": optimizer.sequences_evaluated,
                "training_seconds": seconds,
            }
        else:
            figures = {
                "loss": {"first": None, "last": fit["loss"]},
                **dict.fromkeys(("learning_rate", "first_learning_rate", "eps")),
                "steps": 0,
                "forward_passes": fit["forward_passes"],
                "sequences_evaluated": fit["sequences_evaluated"],
                "training_seconds": fit["seconds"],
            }
        return {
            "method": method.name,
            "method_options": method.options,
            "protocol": self._protocol(),
            "scheme": config.scheme.scheme,
            "trainable_parameters": self.trainable(),
            "model": config.model.model_name_or_path,
            "data": config.name_of_data,
            "metric": self.data.main_metric,
            "batch_size": self.trainer.get_total_train_batch_size(config.training),
            "processes": self.processes,
            "seed": config.training.seed,
            "output_dir": str(self.folder),
            "resumed": self.resumed,
            "before": before,
            "after": after,
            **figures,
            "total_seconds": total,
            "memory": dict(memory),
            "files": {
                **{name: str(self.folder / file) for name, file in files.items()},
                "checkpoints": [str(path) for path in storage.checkpoints(self.folder)] if fit is None else [],
            },
        }

    def _protocol(self) -> dict[str, Any] | None:
        return None if self.config.protocol is None else dataclasses.asdict(self.config.protocol)

    def trainable(self) -> int:
        """Number of trained elements."""
        method = self.config.training.chosen_method()
        if isinstance(method, Baseline) and method.kind != "backward":
            return 0
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)


def dtype_of(model: nn.Module) -> str:
    """The dtype of a model's first parameter, such as ``"float32"``."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")
