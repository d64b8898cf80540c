"""The order in which a trainer takes its examples: :class:`OrderedTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import SequentialSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, has_length

from zotune.training.checkpointing import CheckpointedTrainer
from zotune.training.samplers import GroupedByLength, LongestFirst, Stratified, classes_of, lengths_of


class OrderedTrainer(CheckpointedTrainer):
    """Takes training examples by class or by length where asked to, and evaluates the longest first where that changes no result.

    Hugging Face's own grouping draws from the global generator, so that a resumed epoch is another, and leaves predictions shuffled.
    """

    compute_metrics: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy, seed = self.args.train_sampling_strategy, self.args.seed if self.args.data_seed is None else self.args.data_seed
        if strategy == "stratified" and has_length(dataset):
            classes = classes_of(dataset)
            if classes is not None:
                return Stratified(classes, seed)
        if strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = lengths_of(dataset, self.args.length_column_name)
        if lengths is None:
            raise ValueError(
                "train_sampling_strategy='group_by_length' needs to know how long an example is: give the data a column "
                f"{self.args.length_column_name!r}, prompt_ids or input_ids, or leave the strategy at 'random'."
            )
        return GroupedByLength(lengths, self._train_batch_size * self.args.gradient_accumulation_steps, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        args = self.args
        whole = args.eval_do_concat_batches and not args.batch_eval_metrics and not args.dataloader_drop_last
        if whole and isinstance(eval_dataset, (list, tuple)) and all(map(_has_a_loss_of_its_own, eval_dataset)):
            lengths = lengths_of(eval_dataset, args.length_column_name)
            if lengths is not None:
                return LongestFirst(lengths)
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `transformers.Trainer`, results in the order of the data."""
        batches = getattr(dataloader, "batch_sampler", None)
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)  # several processes have batches of batches
        if not isinstance(sampler, LongestFirst):
            return super().evaluation_loop(dataloader, *args, **kwargs)
        usual = self.compute_metrics
        self.compute_metrics = None if usual is None else lambda found: usual(_restored(found, sampler))
        try:
            found = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = usual
        return found._replace(predictions=sampler.restored(found.predictions), label_ids=sampler.restored(found.label_ids))


def _has_a_loss_of_its_own(example: Any) -> bool:
    """Whether a batch's loss is the mean over its examples, so that it does not matter which are together."""
    return isinstance(example, Mapping) and ("prompt_ids" in example or "label" in example)


def _restored(found: EvalPrediction, sampler: LongestFirst) -> EvalPrediction:
    parts = (found.predictions, found.label_ids, found.inputs, found.losses)
    predictions, labels, inputs, losses = (sampler.restored(part) for part in parts)
    return EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs, losses=losses)
