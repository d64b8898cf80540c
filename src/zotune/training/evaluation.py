"""Evaluation in a trainer: :class:`EvaluatedTrainer`, the objectives of batches, greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from zotune import objectives
from zotune.io.suggest import did_you_mean
from zotune.objectives.losses import padded_for
from zotune.objectives.token_logprobs import IGNORE
from zotune.optim.optimizer import ZerothOrder
from zotune.rewards.evaluation import Shown
from zotune.tasks.collators import LanguageModelCollator
from zotune.tasks.vocabulary import check_token
from zotune.training.checkpointing import CheckpointedTrainer
from zotune.training.completions import COMPLETIONS_FILE, CompletionLog, report
from zotune.training.family_predictions import PREDICTIONS
from zotune.training.raw_text import encoded
from zotune.training.rewarded import TrainerRewards
from zotune.training.samplers import LongestFirst, eval_sampler
from zotune.weights.structure import classifier_of, module_mode

Batch = Mapping[str, Tensor]
LossFunction = Callable[[Batch], Tensor]
Objective = str | Callable[[nn.Module, Batch], Tensor]

#: Metrics of every evaluation, beside its loss.
SPEED = ("runtime", "samples_per_second", "steps_per_second")


class EvaluatedTrainer(CheckpointedTrainer):
    """Evaluates by the objective of the data: options by their scores, answers by greedy generation, text by its loss."""

    data_collator: Any
    compute_metrics: Any
    objective: Objective | None
    rewards: TrainerRewards | None
    eval_objective: Objective | None
    eval_data_collator: Callable[[list[Any]], dict[str, Any]] | None
    on_completions: Callable[[int, Sequence[Shown]], None] | None = None
    _completion_log: CompletionLog | None = None
    _logged: tuple[int, list[Shown]] | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`, with `eval_data_collator`."""
        kept = self.__dict__.get("_eval_dataloaders")
        if eval_dataset is not None and not isinstance(eval_dataset, str) and kept is not None:
            self._eval_dataloaders: dict[str, Any] = {}  # persistent workers are of the data that they were started for
        try:
            with self._evaluation_collator():
                return super().get_eval_dataloader(self._encoded(eval_dataset))
        finally:
            if kept is not None:
                self._eval_dataloaders = kept

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `transformers.Trainer`, with `eval_data_collator`."""
        with self._evaluation_collator():
            return super().get_test_dataloader(self._encoded(test_dataset))

    def _encoded(self, dataset: Any) -> Any:
        if dataset is None or isinstance(dataset, str) or not isinstance(self.data_collator, LanguageModelCollator):
            return dataset
        return encoded(dataset, self.processing_class, self.model, "the data set")

    @contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        """Within the block data loaders have the evaluation's collator, and every row: drop_last is of training."""
        usual, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_data_collator or usual, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = usual, drop_last

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in `transformers.Trainer`; token ids without embeddings are refused, and classifiers get padding of their own."""
        if isinstance(inputs, Mapping) and isinstance(ids := inputs.get("input_ids"), Tensor):
            rows = embedding_rows(self.model)
            if rows is not None and ids.device.type == "cpu" and ids.numel():  # elsewhere it would wait for the device
                check_token(int(ids.max()), rows, self.processing_class)
            if classifier_of(self.model) is not None:
                inputs = {**inputs, **padded_for(self.model, inputs)}
        return super()._prepare_inputs(inputs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return eval_sampler(eval_dataset, self.args)

    def _check_request(self) -> None:
        """ValueError where the arguments ask for evaluations, a metric or a loss that there will not be."""
        args = self.args
        if args.eval_on_start and self.eval_dataset is None:
            raise ValueError("eval_on_start=True needs an eval_dataset: pass one, or leave eval_on_start out.")
        if args.label_smoothing_factor and self.label_smoother is None:
            raise ValueError("label_smoothing_factor cannot be used for several labels an example: leave it out.")
        if self.objective is not None:
            self._check_loss(self.objective)
        metric, metrics_unknown = args.metric_for_best_model, self.compute_metrics is not None and not args.prediction_loss_only
        if metric is None or args.eval_strategy == "no" or metrics_unknown:
            return
        parts = [f"{name}_" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else [""]
        known = [f"{part}{name}" for part in parts for name in ("loss", *SPEED)]
        if metric.removeprefix("eval_") not in known:
            raise ValueError(
                f"metric_for_best_model={metric!r} is none of the metrics of the evaluations{did_you_mean(metric, known)}: there are "
                f"{', '.join(known)}; others need compute_metrics."
            )

    def _check_loss(self, objective: Objective | None) -> None:
        """ValueError where an option of the loss that a model computes from its labels meets another loss."""
        if objective is None:
            return
        named = repr(objective) if isinstance(objective, str) else "a function"
        for option, given in (("label_smoothing_factor", self.args.label_smoothing_factor), ("compute_loss_func", self.compute_loss_func)):
            if given:
                raise ValueError(
                    f"{option} acts on the loss that a model computes from its labels, and here the objective is {named}: leave it out, "
                    "or write such a loss as objective=f(model, batch)."
                )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; of rewards, a few completions are logged."""
        metrics = super().evaluate(*args, **kwargs)
        self.log_completions()
        return metrics

    def log_completions(self) -> None:
        """Writes the completions of the last evaluation to `completions.jsonl`, reports them, and gives them to `on_completions`."""
        if self.rewards is None or not self.rewards.shown or not self.is_world_process_zero():
            return
        step, shown = self.state.global_step, self.rewards.shown
        if (step, shown) == self._logged:
            return
        self._logged = step, shown
        if self._completion_log is None or self._completion_log.path.parent != self._run_folder:
            self._completion_log = CompletionLog(self._run_folder / COMPLETIONS_FILE)
        self._completion_log.write(step, shown)
        report(self.callback_handler.callbacks, step, shown)
        if self.on_completions is not None:
            self.on_completions(step, shown)

    @contextmanager
    def evaluating(self, objective: Objective | None, collator: Any, compute_metrics: Any) -> Iterator[None]:
        """Within the block other data are evaluated: by this objective, with this collator and these metrics."""
        usual = self.eval_objective, self.eval_data_collator, self.compute_metrics
        shown = None if self.rewards is None else self.rewards.shown
        self.eval_objective, self.eval_data_collator, self.compute_metrics = objective, collator, compute_metrics
        try:
            yield
        finally:
            self.eval_objective, self.eval_data_collator, self.compute_metrics = usual
            if self.rewards is not None and shown is not None:
                self.rewards.shown = shown

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise ValueError(" ".join(str(error.args[0]).split())) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; entries of evaluations also have the distance from the weights that training began with, where these are kept."""
        optimizer = None if self.optimizer is None else self.zo_optimizer
        if isinstance(optimizer, ZerothOrder) and any(name.startswith("eval_") for name in logs):
            drift = optimizer.drift()
            if drift is not None:
                logs["drift"] = drift.distance
                logs |= {} if drift.relative is None else {"drift_relative": drift.relative}
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `transformers.Trainer`, with the results in the order of the data; leaves the model's training flags as found."""
        batches = getattr(dataloader, "batch_sampler", None)
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)  # nested where there are several processes
        if self.rewards is not None:
            self.rewards.shown = []
        with module_mode(self.model):
            if not isinstance(sampler, LongestFirst):
                return super().evaluation_loop(dataloader, *args, **kwargs)
            usual = self.compute_metrics
            self.compute_metrics = None if usual is None else lambda found: usual(_restored(found, sampler))
            try:
                found = super().evaluation_loop(dataloader, *args, **kwargs)
            finally:
                self.compute_metrics = usual
        return found._replace(predictions=sampler.restored(found.predictions), label_ids=sampler.restored(found.label_ids))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, predictions, labels) of an evaluation batch.

        "choices", "mlm": log-probabilities of the options under the softmax of their scores (B, C), and `answer`, or `right` (B, C) where
        several options may be right. A missing option scores -inf; -100 where the batch has fewer options than another. "generation": ids
        of the answers (B, S), and `reference`. Prompts that are rewarded: the table of :func:`zotune.rewards.evaluation.evaluated`, and
        their numbers.
        """
        if self.rewards is not None and "prompt_number" in inputs:
            table = self.rewards.evaluate(self._prepare_inputs(inputs))
            return -table[:, 0].nanmean(), *((None, None) if prediction_loss_only else (table, inputs["prompt_number"].to(table.device)))
        objective = self.eval_objective or layout(inputs)
        if objective is None and callable(self.objective):
            objective = self.objective
        if objective is None or objective == "classifier":
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._prepare_inputs(inputs)
        with torch.no_grad():
            if objective in ("choices", "mlm"):
                score = objectives.choice_scores if objective == "choices" else objectives.label_word_logits
                scores = score(model, batch).log_softmax(dim=1)
                answers = batch.get("answer")
                loss = None if answers is None else F.nll_loss(scores, answers)
                return (loss, None, None) if prediction_loss_only else (loss, scores, batch.get("right", answers))
            predict = PREDICTIONS.get(objective) if isinstance(objective, str) and not prediction_loss_only else None
            if predict is not None:
                return predict(model, batch)
            loss = bound(objective, model)(batch).float().mean()
            if objective == "generation" and not prediction_loss_only:
                return loss, greedy(model, batch), batch["reference"]
            return loss, None, None

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        tokenized = "input_ids" in dataset.column_names
        if self.args.remove_unused_columns is None and self.objective is None and tokenized:
            self._set_signature_columns_if_needed()
            return dataset.remove_columns([c for c in dataset.column_names if c not in self._signature_columns])
        return super()._remove_unused_columns(dataset, description)


def measured(trainer: EvaluatedTrainer, examples: Any) -> dict[str, float]:
    """Metrics on encoded examples, without their `eval_` prefix and without the trainer's log and callbacks."""
    return measured_with_output(trainer, examples)[0]


def measured_with_output(trainer: EvaluatedTrainer, examples: Any) -> tuple[dict[str, float], EvalLoopOutput]:
    """As :func:`measured`, and the predictions."""
    loader = trainer.get_eval_dataloader(examples)
    result = trainer.evaluation_loop(loader, "evaluation", prediction_loss_only=None)
    assert result.metrics is not None, "the loop always measures"
    metrics = {name.removeprefix("eval_"): float(value) for name, value in result.metrics.items()}
    metrics.pop("model_preparation_time", None)
    return metrics, result


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of the table that token ids are looked up in; None where it is unknown."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def layout(batch: Mapping[str, Any]) -> str | None:
    """The objective implied by a batch's keys; None: the model's own loss."""
    if "positions" not in batch:
        return None
    if "option_ids" in batch or "option_mask" in batch:
        return "choices"
    return "generation" if "reference" in batch else "lm"


def bound(objective: Objective, model: nn.Module) -> LossFunction:
    """The objective of a model as a function of the batch alone."""
    if isinstance(objective, str):
        return objectives.objective(objective, model)
    return lambda batch: objective(model, batch)


@torch.no_grad()
def greedy(model: nn.Module, batch: Batch) -> Tensor:
    """Greedy continuations of the prompts, token ids (B, S), -100 after an answer's end.

    Args:
        model: a causal language model of transformers (or PEFT), with its own ``generate``.
        batch: prompt_ids (B, P) and prompt_mask (B, P), padded on the left; max_new_tokens (B,), stop_ids (B, E) and pad_id (B,), the
            same for every example.

    Raises:
        ValueError: the model cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(f"{type(model).__name__} has no generate(), which this task's answers need: use a causal language model.")
    prompts = batch["prompt_ids"]
    stops = batch["stop_ids"][0].tolist()
    # The model's own generation settings (sampling, penalties, lengths) are those of a chat, not of an evaluation.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=int(batch["max_new_tokens"][0]),
        eos_token_id=stops or None,
        pad_token_id=int(batch["pad_id"][0]),
    )
    written = generate(input_ids=prompts, attention_mask=batch["prompt_mask"], generation_config=settings)[:, prompts.shape[1] :]
    ended = torch.isin(written, torch.tensor(stops, dtype=written.dtype, device=written.device))
    behind = ended.cumsum(dim=1) - ended.long() > 0
    return written.masked_fill(behind, IGNORE)


def _restored(found: EvalPrediction, sampler: LongestFirst) -> EvalPrediction:
    parts = (found.predictions, found.label_ids, found.inputs, found.losses)
    predictions, labels, inputs, losses = (sampler.restored(part) for part in parts)
    return EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs, losses=losses)
