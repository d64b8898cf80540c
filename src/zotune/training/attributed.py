"""The trainer's part of the shares of examples: which training rows are in a batch, validation batches, and the files of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import TrainOutput, has_length

from zotune.baselines import Baseline
from zotune.io.atomic import whole_file
from zotune.methods import Method
from zotune.optim import attribution
from zotune.optim.attribution import Attribution
from zotune.optim.optimizer import ZerothOrder
from zotune.tasks import PreparedData, prepare
from zotune.tasks.sources import Rows
from zotune.training.arguments import DataArguments
from zotune.training.evaluation import EvaluatedTrainer
from zotune.training.run_folder import ROWS_FILE

#: Key of a batch: the numbers of its examples in the training data.
ROWS = "_rows"

#: Options of data that say how a row is encoded.
_ENCODING = (
    "task", "template", "options", "objective", "loss_over", "problem_type", "bos_token", "max_length", "truncate", "tools",
    "chat_template_kwargs", "columns",
)  # fmt: skip


class AttributedTrainer(EvaluatedTrainer):
    """Records what training examples contribute to the loss of ``attribute_dataset``, where there is one."""

    def __init__(self, *args: Any, attribute_dataset: Any = None, **kwargs: Any) -> None:
        self.attribute_dataset, self._numbers_rows = attribute_dataset, attribute_dataset is not None
        self._rows_of_step: list[Tensor] = []
        super().__init__(*args, **kwargs)
        if attribute_dataset is None:
            return
        check(self.args.chosen_method(), rewards=self.rewards is not None)
        if self.args.attribute_every < 1:
            raise ValueError(f"attribute_every must be at least 1, not {self.args.attribute_every}.")
        if not has_length(self.train_dataset):
            raise ValueError("the shares of examples need training data with a length and an index: load the stream into a list first.")

    def rows_of_steps(self, steps: int) -> list[list[int]]:
        """The numbers of the training examples that each of a run's first steps takes, by running through its data loader.

        Raises:
            ValueError: the training data have no length.
        """
        if not has_length(self.train_dataset):
            raise ValueError("which examples a step takes is known of training data with a length alone: load the stream into a list.")
        found: list[list[int]] = []
        self._numbers_rows = True
        try:
            loader = self.get_train_dataloader()
        finally:
            self._numbers_rows = self.attribute_dataset is not None
        epoch, size = 0, self.args.gradient_accumulation_steps
        state = torch.get_rng_state()
        while len(found) < steps:
            for part in (loader, getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)):  # as transformers' loop does
                renew: Any = getattr(part, "set_epoch", None)
                if renew is not None:
                    renew(epoch)
            parts = [batch[ROWS].tolist() for batch in loader]
            found += [[row for part in parts[at : at + size] for row in part] for at in range(0, len(parts), size)]
            epoch += 1
        torch.set_rng_state(state)  # a loader draws a seed from it
        return found[:steps]

    def losses_on(self, dataset: Any, most: int | None = None) -> tuple[Any, list[Any]]:
        """The training loss as a function of a batch, and batches of a data set's first ``most`` examples (all) for it."""
        examples = self._encoded(dataset)
        size = self.args.per_device_eval_batch_size
        most = len(examples) if most is None else min(len(examples), most)
        collate = self.data_collator
        if isinstance(examples, datasets.Dataset):
            examples = self._remove_unused_columns(examples, description="validation")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="validation")
        pieces = [range(start, min(start + size, most)) for start in range(0, most, size)]
        return self._loss_of([self._prepare_inputs(collate([examples[i] for i in piece])) for piece in pieces])

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        if not is_training or not self._numbers_rows:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        self._rows_of_step = []
        usual = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset, collate = self._remove_unused_columns(dataset, description="training"), usual
        else:
            collate = self._get_collator_with_removed_columns(usual, description="training")
        self.data_collator = _Numbering(collate)
        if kwargs.get("sampler_fn") is not None:  # the order is that of the examples themselves
            kwargs["sampler_fn"] = partial(_of_plain, kwargs["sampler_fn"])
        try:
            return super()._get_dataloader(Numbered(dataset), *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = usual

    def _without_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without the numbers of its examples, which are noted for the step."""
        if self.attribute_dataset is None:
            return inputs
        self._rows_of_step.append(inputs[ROWS])
        optimizer = self.zo_optimizer
        if isinstance(optimizer, ZerothOrder) and self.accelerator.sync_gradients:
            rows, self._rows_of_step = torch.cat(self._rows_of_step), []
            if optimizer.step_estimate.attribution is None:
                optimizer.step_estimate.attribute(self._attribution(optimizer))
            assert optimizer.step_estimate.attribution is not None
            optimizer.step_estimate.attribution.rows = rows.cpu()
        return {name: value for name, value in inputs.items() if name != ROWS}

    def _attribution(self, optimizer: ZerothOrder) -> Attribution:
        loss_fn, batches = self.losses_on(self.attribute_dataset, self.args.attribute_examples)
        return Attribution(optimizer.run, loss_fn, batches, self.args.attribute_every)

    def _loss_of(self, batches: list[Any]) -> tuple[Any, list[Any]]:
        raise NotImplementedError

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        optimizer = self.zo_optimizer
        if self.attribute_dataset is not None and isinstance(optimizer, ZerothOrder) and not optimizer.tail:
            found = optimizer.step_estimate.attribution
            (found or self._attribution(optimizer)).finish()
        return super()._finalize_training(*args, **kwargs)


class Numbered(Dataset):
    """Examples of a data set, each with its number."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.examples[number]


def _of_plain(sampler_fn: Callable[[Any], Any], dataset: Numbered) -> Any:
    return sampler_fn(dataset.examples)


class _Numbering:
    """A collator of numbered examples: the batch of a collator, and the numbers under :data:`ROWS`."""

    def __init__(self, collate: Callable[[Sequence[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collate([example for _, example in numbered])
        return {**batch, ROWS: torch.tensor([number for number, _ in numbered])}


def check(method: Method | Baseline, *, rewards: bool) -> None:
    """ValueError where a run has no shares of examples."""
    if isinstance(method, Baseline):
        raise ValueError(f"the shares of examples are made of loss differences, and {method.name} has none: choose a zeroth-order method.")
    if rewards:
        raise ValueError("the shares of examples are of a smooth loss, and rewards of generated texts are none: leave attribute out.")
    attribution.check(method)


def attribute_data(
    tokenizer: Any, model_config: Any, data: DataArguments, seed: int, examples: int, trained: PreparedData
) -> PreparedData | None:
    """The validation data of `--attribute`, encoded as the training data, which are ``trained``; None without.

    Raises:
        ValueError: they cannot be loaded or encoded; the message names the option.
    """
    if data.attribute is None:
        return None
    if examples < 2:
        raise ValueError(f"attribute_examples must be at least 2, not {examples}.")
    values = {name: value for name, value in data.of_prepare().items() if name in _ENCODING}
    if trained.task_file is not None:
        values |= {"task": trained.task, "template": None, "options": None}
    try:
        return prepare(tokenizer, model_config, train_file=data.attribute, num_train=examples, seed=seed, parts=("train",), **values)
    except ValueError as error:
        raise ValueError(f"--attribute: {error}") from None


def write_rows(folder: Path, rows: Rows) -> None:
    """Writes the rows of the training examples, in their order, with the number of each in its source."""
    with whole_file(folder / ROWS_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
        for number, row in zip(rows.numbers, rows, strict=True):
            file.write(json.dumps({"number": int(number), "row": dict(row)}, ensure_ascii=False, default=str) + "\n")
