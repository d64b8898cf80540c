"""Training in Hugging Face's loop, by forward passes or by a first-order baseline: :class:`ZOTrainer`.

Loop, callbacks, schedules and logging are `transformers.Trainer`'s; the step, the objectives and the checkpoint files are ours.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput, has_length

from zotune.baselines import Baseline, FirstOrder, optimizer_class
from zotune.io.lock import locked
from zotune.methods import AUTO, Method
from zotune.optim.distributed import launch
from zotune.optim.journal_records import StepRecord
from zotune.optim.optimizer import ZerothOrder
from zotune.rewards.calls import RewardFunction
from zotune.rng.directions import Key
from zotune.rng.isolation import isolated_generators
from zotune.training import resume, resume_rules
from zotune.training.arguments import ACCURACY
from zotune.training.attributed import AttributedTrainer
from zotune.training.checkpoint import storage
from zotune.training.config import ZOConfig
from zotune.training.evaluation import Batch, LossFunction, Objective, bound, layout
from zotune.training.log_sums import StepSums
from zotune.training.model_loss import SAMPLE, ModelLoss
from zotune.training.out_of_memory import is_out_of_memory, memory_advice
from zotune.training.private_trainer import PrivateTrainer
from zotune.training.raw_text import with_encoded_texts
from zotune.training.reward_options import check_no_gradient
from zotune.training.rewarded import rewards_of
from zotune.training.samplers import check_training_data, train_sampler
from zotune.training.settled_method import settled_method
from zotune.training.stepped_optimizer import SteppedOptimizer
from zotune.weights.structure import uncompiled

#: Share of the steps over which the default schedule decays.
DECAY = 0.3


class ZOTrainer(AttributedTrainer, PrivateTrainer):
    """`transformers.Trainer` that trains with forward passes only: no backward pass, no `.grad`, inference memory.

    With a first-order `method` (:mod:`zotune.baselines`), gradients come from a backward pass, and there is no journal.

    Args:
        model: any `transformers` model, PEFT model or module; its parameters with `requires_grad` are trained. Of a model by
            `torch.compile` the one that was compiled is trained, as it is.
        args: a :class:`ZOConfig`.
        objective: the loss: ``"lm"``, ``"choices"`` or ``"classifier"`` (see :mod:`zotune.objectives`), or a callable
            ``(model, batch) -> losses`` of shape (B,) or scalar, differentiable or not. None: "choices" or "lm" by the keys of batches with
            `positions`; for others the loss the model computes of its labels (`compute_loss`), per example where it is known as such
            (:mod:`zotune.objectives.label_losses`).
        reward_funcs: in place of an objective, one or several reward functions with TRL's contract, ``f(prompts, completions, **columns) ->
            list[float]``, or names (see :mod:`zotune.rewards`): the model completes the `prompt` of every row, a text or messages, at
            every point of a step, and the mean reward is maximized. The other columns are handed on.
        eval_objective: the same for evaluation; None: by the keys of the evaluation batches, else `objective`.
        eval_data_collator: collator of evaluation and prediction batches; None: that of training.
        attribute_dataset: validation examples, as the training data, that shares are told of (:mod:`zotune.training.attributed`).
        optimizers: a (:class:`ZerothOrder` or :class:`FirstOrder`, scheduler) pair of your own; either may be None.
        kwargs: everything else `transformers.Trainer` takes. Without a `data_collator`, data sets of texts (text, messages, or prompt and
            completion) are encoded by `processing_class` as `zotune train` does.

    Raises:
        ValueError: `args` is not a ZOConfig, or another kind of optimizer is passed.

    `evaluate` and `predict` on "choices" batches return log-probabilities of the options (B, C) as predictions, and the indices of the
    right options as label_ids. The run is recorded in ``output_dir/journal.zo`` (:mod:`zotune.optim.journal`).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ZOConfig | None = None,
        *positional: Any,
        objective: Objective | None = None,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        eval_objective: Objective | None = None,
        eval_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        optimizers: tuple[ZerothOrder | FirstOrder | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        **kwargs: Any,
    ) -> None:
        args = ZOConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, ZOConfig):
            raise ValueError(f"ZOTrainer takes args=zotune.ZOConfig(...), not {type(args).__name__}.")
        if optimizers[0] is not None and not isinstance(optimizers[0], (ZerothOrder, FirstOrder)):
            raise ValueError(
                f"ZOTrainer steps with zotune.ZerothOrder, not {type(optimizers[0]).__name__}: pass "
                "optimizers=(zotune.ZerothOrder(model, method, lr=...), None), or choose the update rule with "
                "ZOConfig(method=..., update_rule=...)."
            )
        if kwargs.get("optimizer_cls_and_kwargs") is not None:
            raise ValueError(
                "optimizer_cls_and_kwargs builds a backward-pass optimizer: choose the update rule with "
                "ZOConfig(method=..., update_rule=..., update_rule_args=...)."
            )
        self.objective, self.eval_objective, self.eval_data_collator = objective, eval_objective, eval_data_collator
        self._own_optimizer = optimizers[0] is None
        self._from_base = self._along_journal = False
        self._micro_batches: list[Batch] = []
        self._bound: tuple[Objective, LossFunction] | None = None
        self._since_train = StepSums()
        self._model_loss = ModelLoss(self)
        model = None if model is None else uncompiled(model)
        if reward_funcs is not None and objective is not None:
            raise ValueError("objective and reward_funcs are two ways to say what is optimized: give one of them.")
        if reward_funcs is not None or objective == ACCURACY:
            check_no_gradient(args.chosen_method())
        kwargs = with_encoded_texts(model, objective or reward_funcs, positional, kwargs)
        self.rewards, kwargs = rewards_of(model, args, reward_funcs, kwargs)
        super().__init__(model, args, optimizers=optimizers, **kwargs)
        self._check_request()
        for chosen in (objective, eval_objective):
            if chosen is not None:
                bound(chosen, self.model)  # an unknown name fails here, before any work

    # --- a run ---

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, or resumes bit for bit.

        Args:
            resume_from_checkpoint: True: resume from the newest whole checkpoint of `output_dir` (the base weights where there is none) and
                the journal after it. The path of a checkpoint: resume from that, without the later steps.
            trial, ignore_keys_for_eval: as in `transformers.Trainer`.

        Raises:
            ValueError: `output_dir` holds a run that is not resumed or cannot be, or another process trains there.
            MemoryError: a step does not fit into memory; the message names a batch size, the weights are those before the step.
            NonFiniteLossError: the loss was not finite for `max_nonfinite_steps` steps in a row.
        """
        self._run_folder = Path(self._get_output_dir(trial))
        with self.workers.on_first(locked(self._run_folder)):
            return self._train_locked(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train_locked(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if self._own_optimizer:
            self.optimizer = None
        self._from_base, self._batch_of_run = False, None
        self._along_journal = resume_from_checkpoint is True
        self._train_batch_size = self.args.train_batch_size * self.workers.size
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            folder = None
            self.workers.from_first(partial(resume.refuse_used, self._run_folder))
        else:
            journal, alone = self._journal_path, self._own_optimizer
            place = partial(resume.checkpoint_of, self._run_folder, journal, resume_from_checkpoint, alone=alone)
            found = self.workers.from_first(lambda: str(place() or ""))
            folder = Path(found) if found else None
            self._from_base = folder is None
            self._compare_options(self.workers.from_first(partial(resume.recorded, journal, folder)), folder or journal)
        check_training_data(self.train_dataset, self.args.dataloader_drop_last, self._train_batch_size)
        if (self.args.label_smoothing_factor or self.compute_loss_func) and has_length(self.train_dataset):
            self._check_loss(layout(self._collated([0])))
        agents = launch.agents(self.workers)
        if self.workers.first:
            launch.mark(self._run_folder, agents)
            storage.remove_drafts(self._run_folder)
        self._micro_batches = []
        self._since_log, self._since_train, self._identity = StepSums(), StepSums(), None
        try:
            return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
        finally:
            self._release_model()

    def _compare_options(self, then: dict[str, Any] | None, place: Path) -> None:
        """ValueError where the run at ``place`` was determined by other options; its batch stays with any number of processes."""
        if then is None:
            return
        resume_rules.check_equal(place, then, self._determining())
        self._batch_of_run = resume_rules.Batch(**then["batch"])
        self._train_batch_size = resume_rules.micro_batch(place, self._batch_of_run, self.batch_by_options(), self.workers.size)

    def _release_model(self) -> None:
        """Leaves a plain model with the trained weights, also after an interruption."""
        if self.optimizer is None:
            return
        optimizer = self.zo_optimizer
        if self._own_optimizer:
            optimizer.remove_hooks()
        if isinstance(optimizer, ZerothOrder) and optimizer.journal is not None:
            optimizer.journal.close()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = train_sampler(dataset, self.args, self._train_batch_size * self.args.gradient_accumulation_steps)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        if is_training and self.workers.several:
            batches: Any = getattr(loader, "batch_sampler", None)
            if not hasattr(batches, "process_index"):
                raise ValueError("several processes need training data with a length and an index: load the stream into a list first.")
            # Each gets every batch, which the optimizer partitions; an epoch's last one is not filled up from its beginning.
            batches.num_processes, batches.process_index, batches.even_batches = 1, 0, False
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Examples per step."""
        return self._train_batch_size * args.gradient_accumulation_steps

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.workers.several:
            self.model._is_accelerate_prepared = True  # there are no gradients to average: no DistributedDataParallel
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        optimizer = self.zo_optimizer
        if isinstance(optimizer, FirstOrder):
            return prepared
        if not self._from_base and resume_from_checkpoint is None:
            self.workers.from_first(partial(resume.begin, optimizer, self.model, self._journal_path, self._determining()))
            return prepared
        along = self._along_journal

        def resumed() -> tuple[Any, ...]:
            resume.resume(optimizer, self._journal_path, resume_from_checkpoint, along_journal=along)
            return [*optimizer.tail] if self.workers.several else None, optimizer.evaluator.batched, optimizer.evaluator.rowwise

        tail, batched, rowwise = self.workers.from_first(resumed)
        if not self.workers.first:
            optimizer.evaluator.restore(batched, rowwise)
            optimizer.fast_forward([record if isinstance(record, dict) else StepRecord.of(record) for record in tail])
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Hugging Face's loop takes one more step when a complete run is resumed.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the config, unless one was passed."""
        if not isinstance(self.optimizer, SteppedOptimizer):
            self.optimizer = SteppedOptimizer(self.optimizer or self._new_optimizer())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in `transformers.Trainer`; ``warmup_stable_decay`` decays over the last 30% of the steps by default.

        A zeroth-order step makes progress in flat directions, whose noise no later, smaller step removes: there a constant rate is best.
        Noise in sharp directions vanishes when the rate decays, in few steps (2405.18392 on such schedules).
        """
        given, kind = self.args.lr_scheduler_kwargs, self.args.lr_scheduler_type
        if str(getattr(kind, "value", kind)) == "warmup_stable_decay" and "num_decay_steps" not in (given or {}):
            decay = {"decay_type": "linear", "num_decay_steps": math.ceil(DECAY * num_training_steps)}
            self.args.lr_scheduler_kwargs = {**decay, **(given or {})}
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = given

    def _new_optimizer(self) -> ZerothOrder | FirstOrder:
        args = self.args
        common = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
        common["max_nonfinite_steps"] = args.max_nonfinite_steps
        method = args.chosen_method()
        if isinstance(method, Baseline):
            common |= {"max_grad_norm": args.max_grad_norm, "max_steps": self.state.max_steps or None}
            return optimizer_class(method)(self.model, method, **common)
        examples = self._sample_batches if has_length(self.train_dataset) else None
        anchor, self._anchor = self._anchor or self._anchored(), None
        common |= {"anchor_decay": args.anchor_decay, "anchor": anchor}
        common |= {"forward_batching": args.forward_batching, "privacy": self.privacy() if self.private else None}
        optimizer = ZerothOrder(self.model, self._method(), workers=self.workers, sample_batches=examples, **common)
        if self.rewards is not None:
            self.rewards.evaluates_by(optimizer.method)
        return optimizer

    def _sample_batches(self, step: int, count: int) -> list[Batch]:
        """Micro-batches of ``count`` training examples for the loss function, drawn by the run's seed and the step alone."""
        return self._loss_of(self._draw_batches(step, count))[1]

    def _draw_batches(self, step: int, count: int) -> list[Batch]:
        return self._batches_of(np.random.default_rng((self.args.seed, step)).permutation(len(self.train_dataset))[:count].tolist(), step)

    def _batches_of(self, chosen: Sequence[int], step: int) -> list[Batch]:
        size = self.args.per_device_train_batch_size
        pieces = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        with isolated_generators(Key(self.args.seed, step, 0, "", "sample"), []):  # a collator may draw
            return [self._prepare_inputs(self._collated(piece)) for piece in pieces]

    def _collated(self, indices: Sequence[int]) -> Batch:
        """A batch of training examples, as the data loader makes it."""
        dataset, collate = self._training_rows()
        return collate([dataset[index] for index in indices])

    def _method(self) -> Method:
        """The config's method, with options that it leaves open set by data, loss and batch size."""
        step_size = self._train_batch_size * self.args.gradient_accumulation_steps
        guidable = (lambda: False) if self.rewards is not None else partial(self._model_loss.is_guidable, self.objective)
        return settled_method(self.args, self.train_dataset, step_size, guidable=guidable, per_example=self._loss_is_per_example)

    def _loss_is_per_example(self) -> bool:
        """Whether the loss of some training examples is one number for each; assumed where they cannot be drawn."""
        if isinstance(self.objective, str):
            return bool(getattr(bound(self.objective, self.model), "per_example", True))
        if self.rewards is not None or not has_length(self.train_dataset):
            return True
        batch = self._draw_batches(0, min(self.args.per_device_train_batch_size, SAMPLE))[0]
        return self._model_loss.is_per_example(batch, self.objective)

    # --- a step ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Collects a micro-batch, and takes the step at the last one; the step's mean loss (else 0)."""
        self._micro_batches.append(self._prepare_inputs(self._without_rows(inputs)))
        nothing = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return nothing
        batches, self._micro_batches = self._micro_batches, []
        loss_fn, batches = self._sampled() if self.private else self._loss_of(batches, num_items_in_batch)
        start = time.perf_counter()
        try:
            self.zo_optimizer.step(loss_fn, batches[0] if len(batches) == 1 else batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(memory_advice(self.args, self.zo_optimizer.steps)) from error
        seconds = time.perf_counter() - start
        report = self.zo_optimizer.last_report
        assert report is not None
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if not self.private:
            self._since_log.add(report, seconds)
            self._since_train.add(report, seconds)
        loss = torch.as_tensor(report.loss, dtype=torch.float32, device=self.args.device)
        return loss if math.isfinite(report.loss) else nothing  # the report is on the CPU: nothing waits for the device

    def _loss_of(self, batches: list[Batch], num_items_in_batch: Tensor | int | None = None) -> tuple[LossFunction, list[Batch]]:
        """The loss function of a step, and its micro-batches for it."""
        if self.rewards is not None:
            return self.rewards.step(batches, self.zo_optimizer.steps)  # type: ignore[return-value]
        objective = self.objective or layout(batches[0])
        if objective is not None:
            self._check_loss(objective)
            if self._bound is None or self._bound[0] != objective:  # one object for all steps, which CUDA graphs identify it by
                self._bound = objective, bound(objective, self.model)
            return self._bound[1], batches
        return self._model_loss.step(batches, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: a first-order step clips its gradient itself."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """That of the last step, before clipping; None in zeroth order."""
        return getattr(self.zo_optimizer.last_report, "grad_norm", None)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts the tokens of a step once, though every process is given them all."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.workers.size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a micro-batch: for each evaluation a third of a forward and backward pass."""
        return super().floating_point_ops(inputs) // 3 * self.zo_optimizer.method.forwards_per_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; entries of training steps also have the loss difference, its standard error, the forward passes and the speed."""
        if self._since_log.steps and {"loss", "learning_rate"} <= logs.keys():
            del logs["loss"]  # Hugging Face's mean counts a skipped step as loss 0
            rate = logs.pop("learning_rate")
            if self.args.learning_rate == AUTO and self.zo_optimizer.last_report is not None:
                rate = self.zo_optimizer.last_report.lr[0]  # the scheduler has the factor only
            logs.update(self._since_log.entries(), learning_rate=rate)
            if self.rewards is not None:
                logs.update(self.rewards.entries(logs, self.workers))
            logs["forward_passes"] = self.zo_optimizer.forward_passes
            self._since_log = StepSums()
        super().log(logs, start_time)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        # `train_loss` is the mean over the steps of this call, without the skipped ones.
        self._tr_loss = torch.zeros((), device=self.args.device)
        self._total_loss_scalar = self._since_train.mean_loss() * (self.state.global_step - self._initial_global_step)
        return super()._finalize_training(trial, num_train_samples, start_time)
