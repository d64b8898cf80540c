"""What a run writes into its folder: :class:`RunRecord`."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from zotune.baselines import Baseline, FirstOrder
from zotune.io.atomic import whole_file
from zotune.io.json_files import write_json
from zotune.tasks import PreparedData
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.training.config import settings
from zotune.training.curve import curve_of, write_curve
from zotune.training.run_config import RunConfig
from zotune.training.trainer import ZOTrainer
from zotune.weights.trainable_scales import dequantize

Metrics = Mapping[str, float]


class RunRecord:
    """The files of one run.

    Args:
        config: of the run.
        trainer: of the run.
        data: of the run.
        base: absolute folder or hub id of the model that is trained.
        processes: that train together.
    """

    def __init__(self, config: RunConfig, trainer: ZOTrainer, data: PreparedData, base: str, processes: int):
        self.config, self.trainer, self.data, self.base, self.processes = config, trainer, data, base, processes
        self.folder = config.folder

    # -- before training -------------------------------------------------------------------------------------------

    def start(self, fresh: Sequence[str], before: Metrics | None) -> None:
        """Writes `zotune_run.json`, and the head where it was drawn at random.

        Args:
            fresh: names of parameters that the model's files lack: without them the journal could not be replayed.
            before: metrics before training.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            weights = dict(self.trainer.model.named_parameters())
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
                "command": shlex.join(["zotune", "train", *self.config.words]),
                "working_directory": str(Path.cwd()),
                "base_model": self.base,
                "dtype": dtype_of(self.trainer.model),
                "classes": list(self.data.label_names) if self.data.train_objective == "classifier" else None,
                "metric": self.data.main_metric,
                "before": before,
                "model_arguments": dataclasses.asdict(self.config.model),
                "data_arguments": _absolute(dataclasses.asdict(self.config.data)),
                "scheme": dataclasses.asdict(self.config.scheme),
                "training_arguments": settings(self.config.training),
                "versions": run_folder.versions(),
            },
        )

    def restore_head(self) -> None:
        """Loads the head that the run began with, where it was drawn at random."""
        path = self.folder / run_folder.HEAD_FILE
        if path.is_file():
            self.trainer.model.load_state_dict(load_file(path), strict=False)

    # -- after training --------------------------------------------------------------------------------------------

    def save_model(self) -> None:
        """Writes the trained model; the folder holds all of its files or none."""
        draft = self.folder / ".model.partial"
        storage.remove_drafts(self.folder)
        try:
            dequantize(self.trainer.model)  # ordinary weights, which transformers loads
            self.trainer.save_model(str(draft))
            run_folder.publish(draft, self.folder)
        except BaseException:  # a full disk: no half model, and space for what is saved next
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def write_summary(self, summary: Mapping[str, Any], *, curve_title: str | None = None) -> None:
        """Writes `summary.json`, and with a title the history and the curve."""
        if curve_title is None:
            write_json(self.folder / run_folder.SUMMARY_FILE, summary)
            return
        history, metric = self.trainer.state.log_history, self.data.main_metric
        write_json(self.folder / run_folder.HISTORY_FILE, {"entries": history})
        write_json(self.folder / run_folder.SUMMARY_FILE, summary)
        before, after = summary["before"], summary["after"]
        curve = curve_of(history, metric, (before or {}).get(metric) if self.data.dev is None else None)
        if self.data.dev is None and after is not None:
            curve.metric = sorted({**dict(curve.metric), self.trainer.state.global_step: after[metric]}.items())
        write_curve(curve, self.folder / run_folder.CURVE_FILE, f"{curve_title} on {self.config.name_of_data}")

    def summary(
        self, before: Metrics | None, after: Metrics | None, seconds: float, total: float, memory: Mapping[str, int | str]
    ) -> dict[str, Any]:
        """What `summary.json` says of a run that trained.

        Args:
            before, after: metrics before and after training.
            seconds: of training.
            total: seconds of the run.
            memory: bytes with model and data loaded, at the peak of the evaluation before training, at the peak of training.
        """
        history, optimizer = self.trainer.state.log_history, self.trainer.zo_optimizer
        assert optimizer is not None, "training has made one"
        losses = [entry["loss"] for entry in history if "loss" in entry]
        files = {
            "model": str(self.folder),
            "journal": str(self.folder / run_folder.JOURNAL_FILE),
            "curve": str(self.folder / run_folder.CURVE_FILE),
            "summary": str(self.folder / run_folder.SUMMARY_FILE),
            "checkpoints": [str(path) for path in storage.checkpoints(self.folder)],
        }
        if isinstance(optimizer, FirstOrder):
            del files["journal"]
        return self.facts() | {
            "before": before,
            "after": after,
            "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
            "learning_rate": self.config.training.learning_rate,
            "first_learning_rate": next((e["learning_rate"] for e in history if "learning_rate" in e), None),
            "eps": optimizer.eps,
            "steps": self.trainer.state.global_step,
            # Of a first-order method: what its passes cost in forward passes (a backward pass counts as two).
            "forward_passes": optimizer.forward_passes,
            "sequences_evaluated": optimizer.sequences_evaluated,
            "training_seconds": seconds,
            "total_seconds": total,
            "memory": dict(memory),
            "files": files,
        }

    def summary_without_steps(
        self, before: Metrics | None, after: Metrics, counts: Mapping[str, Any], total: float, memory: Mapping[str, int | str]
    ) -> dict[str, Any]:
        """What `summary.json` says of a baseline that takes no step.

        Args:
            before, after: metrics of the model as it is, and of the baseline.
            counts: loss, forward_passes, sequences_evaluated and seconds of fitting.
            total: seconds of the run.
            memory: as in :meth:`summary`.
        """
        return self.facts() | {
            "before": before,
            "after": after,
            "loss": {"first": None, "last": counts["loss"]},
            "learning_rate": None,
            "first_learning_rate": None,
            "eps": None,
            "steps": 0,
            "forward_passes": counts["forward_passes"],
            "sequences_evaluated": counts["sequences_evaluated"],
            "training_seconds": counts["seconds"],
            "total_seconds": total,
            "memory": dict(memory),
            "files": {"summary": str(self.folder / run_folder.SUMMARY_FILE), "checkpoints": []},
        }

    def facts(self) -> dict[str, Any]:
        """What a summary says of the request."""
        config = self.config
        method = config.training.chosen_method()
        return {
            "method": method.name,
            "method_options": method.options,
            "scheme": config.scheme.scheme,
            "trainable_parameters": self.trainable(),
            "model": config.model.model_name_or_path,
            "data": config.name_of_data,
            "metric": self.data.main_metric,
            "batch_size": self.trainer.get_total_train_batch_size(config.training),
            "processes": self.processes,
            "seed": config.training.seed,
            "output_dir": str(self.folder),
        }

    def trainable(self) -> int:
        """Elements that are trained."""
        method = self.config.training.chosen_method()
        if isinstance(method, Baseline) and method.kind != "backward":
            return 0
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)


def dtype_of(model: nn.Module) -> str:
    """The dtype of a model's first parameter, such as ``"float32"``."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    """Data options whose paths hold from any folder, for a later `zotune eval` of the run."""
    for name in ("data_dir", "train_file", "eval_file"):
        if data[name] is not None:
            data[name] = str(Path(data[name]).expanduser().resolve())
    if data["task"] and data["task"].endswith((".yaml", ".yml")):
        data["task"] = str(Path(data["task"]).resolve())
    return data
