"""Private runs in Hugging Face's loop: :class:`PrivateTrainer` draws the examples of a step, and reports ε in place of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import TrainOutput, has_length

from zotune.optim.optimizer import ZerothOrder
from zotune.optim.privacy import Privacy
from zotune.optim.privacy_refusals import SEVERAL
from zotune.rng.secret import new_key
from zotune.training import private_runs
from zotune.training.evaluation import Batch, EvaluatedTrainer, LossFunction, embedding_rows
from zotune.training.privacy_options import is_private

#: Times that a run says how much it has spent.
REPORTS = 20
#: Entries of the log that a private run does not have: they are made of losses, or of the drawn examples.
_UNKNOWN = ("loss", "train_loss", "total_flos")


class PrivateTrainer(EvaluatedTrainer):
    """An :class:`EvaluatedTrainer` whose training is private where its config says so.

    Hugging Face's loop runs over the numbers of steps; a step then draws its examples by the run's secret key.
    """

    _own_optimizer: bool
    _from_base: bool
    _along_journal: bool
    _train_batch_size: int
    _key: bytes | None = None
    _is_new = False
    _public: list[Batch] | None = None
    _reported = -1

    @property
    def private(self) -> bool:
        """Whether the config asks for a private run."""
        return is_private(self.args)

    def private_key(self, *, new: bool) -> bytes:
        """The key of the run that begins (``new``) or resumes in the trainer's folder; ValueError where there is none to resume with."""
        if self._key is None:
            self._key, self._is_new = (new_key(), True) if new else (private_runs.read_key(self._run_folder), False)
        return self._key

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`; a private run has its key then."""
        passed = None if self._own_optimizer else self.zo_optimizer
        if not self.private:
            if getattr(passed, "private", None) is not None:
                raise ValueError(
                    "the optimizer is private, and the trainer would draw its examples: set dp_... in ZOConfig, and pass none."
                )
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._check_private(passed)
        resumes = resume_from_checkpoint is not None or self._from_base
        if resumes and not self._along_journal:
            raise ValueError(
                "a private run resumes behind its last step alone: the steps after a checkpoint are spent, and would be spent twice. "
                "Resume with resume_from_checkpoint=True (--resume_from_checkpoint true)."
            )
        self.private_key(new=not resumes)
        self._reported = -1
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._key, self._public = None, None  # a key is for one run

    def _check_private(self, passed: Any) -> None:
        if passed is not None:
            raise ValueError("a private run makes its own optimizer, which has the key: leave optimizers out.")
        if getattr(self, "attribute_dataset", None) is not None:
            raise ValueError("shares of examples stand in the journal, without noise: leave attribute_dataset out of a private run.")
        if self.workers.several:
            raise ValueError(SEVERAL)
        if not has_length(self.train_dataset):
            raise ValueError("a private run draws from all training examples: load the stream into a list first.")
        if self.eval_dataset is self.train_dataset:
            raise ValueError("eval_dataset is the training data, which would be evaluated without noise: give public examples.")

    def privacy(self) -> Privacy:
        """The privacy of the run that begins or resumes."""
        self._public = self._loss_of([self._prepare_inputs(self._public_examples())])[1]
        steps, batch = self.args.max_steps, self.get_total_train_batch_size(self.args)
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * self._steps_per_epoch())
        recorded = None if self._is_new else private_runs.recorded_noise(self._journal_path)
        return private_runs.privacy_of(
            self.args, len(self.train_dataset), batch, steps, recorded, key=self.private_key(new=False), public_batch=self._public
        )

    def _public_examples(self) -> Batch:
        dataset, collate = self._training_rows()
        evaluated = self.eval_dataset
        if isinstance(evaluated, datasets.Dataset):
            evaluated = self._remove_unused_columns(evaluated, description="evaluation")
        vocabulary = embedding_rows(self.model) or len(self.processing_class or "..")
        rows = max(2, self.args.per_device_train_batch_size)
        return private_runs.public_batch(dataset, evaluated, self.data_collator, collate, rows, vocabulary)

    def _training_rows(self) -> tuple[Any, Callable[[Sequence[Any]], Batch]]:
        """The training examples without unused columns, and what makes a batch of some."""
        dataset, collate = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description="training"), collate
        return dataset, self._get_collator_with_removed_columns(collate, description="training")

    def _steps_per_epoch(self) -> int:
        return max(1, len(self.train_dataset) // self.get_total_train_batch_size(self.args))

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; of a private run, the numbers of its micro-batches."""
        if not self.private:
            return super().get_train_dataloader()
        steps: Dataset = private_runs.StepNumbers(self._steps_per_epoch() * self.args.gradient_accumulation_steps)
        return self.accelerator.prepare(DataLoader(steps, batch_size=1))

    def _sampled(self) -> tuple[LossFunction, list[Batch]]:
        """The loss function of a private step, and the micro-batches of the examples that it has drawn; none where it has drawn none."""
        optimizer = self.zo_optimizer
        assert isinstance(optimizer, ZerothOrder) and self._public is not None
        batches = self._batches_of(optimizer.sample(), optimizer.steps)
        loss_fn, found = self._loss_of(batches or self._public)
        return loss_fn, found if batches else []

    def _loss_of(self, batches: list[Batch], num_items_in_batch: Any = None) -> tuple[LossFunction, list[Batch]]:
        raise NotImplementedError

    def _batches_of(self, indices: Sequence[int], step: int) -> list[Batch]:
        raise NotImplementedError

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.private and self._is_new and self._key is not None:
            private_runs.write_key(self._run_folder, self._key)  # before the journal, without which the run has released nothing
        return prepared

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `transformers.Trainer`; 0 in a private run, whose tokens would tell of the examples."""
        return 0 if self.private else super().floating_point_ops(inputs)

    def spent(self) -> dict[str, Any] | None:
        """What a private run has spent so far: its settings, ``steps`` and ``epsilon``; None for other runs."""
        optimizer = self.zo_optimizer
        if not isinstance(optimizer, ZerothOrder) or optimizer.private is None:
            return None
        privacy = optimizer.private.private.privacy
        return {"epsilon": privacy.epsilon(optimizer.steps), "steps": optimizer.steps, **privacy.public()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; a private run has no loss, and says now and then which ε it has spent."""
        if self.private:
            trained = "loss" in logs or "train_loss" in logs
            for name in _UNKNOWN:
                logs.pop(name, None)
            due = self.state.global_step * REPORTS // max(1, self.state.max_steps)
            if trained and due > self._reported and (found := self.spent()) is not None:
                self._reported = due
                logs |= {"epsilon": found["epsilon"], "forward_passes": self.zo_optimizer.forward_passes}
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        found = super()._finalize_training(*args, **kwargs)
        if not self.private:
            return found
        return TrainOutput(found.global_step, math.nan, {name: value for name, value in found.metrics.items() if name not in _UNKNOWN})
