"""The data, the loss and the order of a finished run, from its folder: :func:`rebuilt_trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from zotune.tasks import PreparedData, prepare
from zotune.training import run_file, run_folder
from zotune.training.arguments import DataArguments
from zotune.training.config import ZOConfig
from zotune.training.trainer import ZOTrainer

#: Options of a run that its order of examples and its batches depend on.
_OF_ORDER = ("seed", "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last")


def rebuilt_trainer(run: Path, model: nn.Module, tokenizer: Any, scratch: str, *, use_cpu: bool) -> tuple[ZOTrainer, PreparedData]:
    """A trainer with a run's data, loss and order of examples, and the data.

    Args:
        run: the run's folder.
        model: with the run's architecture.
        tokenizer: of the base model.
        scratch: a folder that the trainer may write to.
        use_cpu: stay on the CPU where there is a GPU.

    Raises:
        ValueError, FileNotFoundError: the folder is damaged, its data are not those of the run any more, or the run optimized rewards.
    """
    path = run / run_folder.RUN_FILE
    record = run_file.parsed(run_folder.read_run(run), path)
    options, trained = DataArguments(**record.data_arguments), record.training_arguments
    if options.generates:
        raise ValueError("rewards of generated texts are no smooth losses of the examples: name a run that was trained by a loss.")
    if record.batch is None:
        raise ValueError(f"{path} is damaged: it does not say what a batch of the run was.")
    data = prepare(tokenizer, model.config, seed=trained.get("seed", 42), parts=("train", "eval"), **options.of_prepare())
    found = run_file.examples_of(data.train)
    if record.examples is not None and found != record.examples:
        raise ValueError(
            f"{path}: the training examples are not those of the run any more ({record.examples.count} then, "
            f"{0 if found is None else found.count} now): its files or the tokenizer changed."
        )
    config = ZOConfig(
        output_dir=scratch,
        per_device_train_batch_size=record.batch.examples // record.batch.accumulation,
        gradient_accumulation_steps=record.batch.accumulation,
        per_device_eval_batch_size=trained.get("per_device_eval_batch_size", 16),
        report_to="none",
        disable_tqdm=True,
        use_cpu=use_cpu,
        **{name: trained[name] for name in _OF_ORDER if name in trained},
    )
    trainer = ZOTrainer(
        model=model,
        args=config,
        **data.optimized(None),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=data.collate_train,
        eval_data_collator=data.collate_eval,
        compute_metrics=data.compute_metrics,
    )
    return trainer, data
