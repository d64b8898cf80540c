"""How a trainer evaluates: :class:`EvaluatedTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from zotune import objectives
from zotune.training import generation
from zotune.training.sampling import OrderedTrainer
from zotune.weights.structure import module_mode

Batch = Mapping[str, Tensor]
LossFunction = Callable[[Batch], Tensor]
Objective = str | Callable[[nn.Module, Batch], Tensor]


class EvaluatedTrainer(OrderedTrainer):
    """Evaluates by the objective that the data ask for: options by their scores, answers by greedy generation, text by its loss."""

    data_collator: Any
    objective: Objective | None
    eval_objective: Objective | None
    eval_data_collator: Callable[[list[Any]], dict[str, Any]] | None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`, with `eval_data_collator`."""
        with self._evaluation_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `transformers.Trainer`, with `eval_data_collator`."""
        with self._evaluation_collator():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        usual = self.data_collator
        self.data_collator = self.eval_data_collator or usual
        try:
            yield
        finally:
            self.data_collator = usual

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `transformers.Trainer`, results in the order of the data; the model's training flags are left as found."""
        with module_mode(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, predictions, labels) of an evaluation batch.

        "choices": log-probabilities of the options under the softmax of their scores (B, C), and `answer`. An option
        that an example does not have scores -inf, or -100 where its batch has fewer options than another. With several right options,
        the labels are (B, C), 1 for those. "generation": the answers' token ids (B, S), and `reference`.
        """
        objective = self.eval_objective or layout(inputs)
        if objective is None and callable(self.objective):
            objective = self.objective
        if objective is None or objective == "classifier":
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._prepare_inputs(inputs)
        with torch.no_grad():
            if objective == "choices":
                scores = objectives.choice_scores(model, batch).log_softmax(dim=1)
                answers = batch.get("answer")
                loss = None if answers is None else F.nll_loss(scores, answers)
                return (loss, None, None) if prediction_loss_only else (loss, scores, batch.get("right", answers))
            if objective == "generation":
                loss = bound(objective, model)(batch).float().mean()
                return (loss, None, None) if prediction_loss_only else (loss, generation.greedy(model, batch), batch["reference"])
            return bound(objective, model)(batch).float().mean(), None, None

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        tokenized = "input_ids" in dataset.column_names
        if self.args.remove_unused_columns is None and self.objective is None and tokenized:
            self._set_signature_columns_if_needed()
            return dataset.remove_columns([c for c in dataset.column_names if c not in self._signature_columns])
        return super()._remove_unused_columns(dataset, description)


def layout(batch: Mapping[str, Any]) -> str | None:
    """The objective that a batch's keys ask for; None when the model's own loss is meant."""
    if "positions" not in batch:
        return None
    if "option_ids" in batch or "option_mask" in batch:
        return "choices"
    return "generation" if "reference" in batch else "lm"


def bound(objective: Objective, model: nn.Module) -> LossFunction:
    if isinstance(objective, str):
        return objectives.objective(objective, model)
    return lambda batch: objective(model, batch)
