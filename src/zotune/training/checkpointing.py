"""The files of a run under Hugging Face's loop: :class:`CheckpointedTrainer`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, has_length

from zotune.baselines import FirstOrder
from zotune.io.lock import check_in_place
from zotune.optim.anchor import Anchor
from zotune.optim.distributed import Workers
from zotune.optim.optimizer import ZerothOrder
from zotune.training import adapters, base_identity, resume_rules
from zotune.training.base_identity import BaseIdentity
from zotune.training.checkpoint import contents, identity, offloaded, schema, storage
from zotune.training.config import settings
from zotune.training.log_sums import StepSums
from zotune.training.run_folder import JOURNAL_FILE, adapter_facts
from zotune.training.stored_weights import StoredWeights
from zotune.weights.computed_linear import is_computed
from zotune.weights.offload import stream_of
from zotune.weights.quantized_linear import is_quantized
from zotune.weights.structure import module_mode


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` of a :class:`ZerothOrder` or :class:`FirstOrder`; its checkpoints are safetensors and JSON, whole or absent.

    Hugging Face's checkpoints hold pickles, appear before they are complete, and resume silently where a file is missing.
    """

    optimizer: Any  # the ZerothOrder or FirstOrder; within an AcceleratedOptimizer from the start of training

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._since_log = StepSums()
        self._in_checkpoint = False
        self._anchor: Anchor | None = None  # the weights that a resumed run began with
        self._identity: identity.WeightsIdentity | None = None
        self._batch_of_run: resume_rules.Batch | None = None  # of a resumed one
        self.base: BaseIdentity | None = None  # of the files that the model is from; None: of the model
        self.model_files: dict[str, Any] = {}  # JSON files that are saved with the model, by name
        self.chats = False  # whether the training data are chats, which the Modelfile of a GGUF model's adapter tells Ollama
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end and self.args.save_only_model and keeps_factors(self.model):
            raise ValueError(
                "the trained factors of a quantized model are in the optimizer states of its checkpoints: leave save_only_model or "
                "load_best_model_at_end out."
            )
        self._run_folder = Path(self.args.output_dir)
        self.workers = Workers(self.args.parallelism, "same", self.args.check_workers_steps)
        self._train_batch_size *= self.workers.size  # every process is given the whole batch of a step

    @property
    def zo_optimizer(self) -> ZerothOrder | FirstOrder:
        """The optimizer, a :class:`FirstOrder` for a first-order method; ValueError before training."""
        if self.optimizer is None:
            raise ValueError("the optimizer is built when training starts: call train() first.")
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    @property
    def _journal_path(self) -> Path:
        journal = None if self.optimizer is None else self.zo_optimizer.journal
        return self._run_folder / JOURNAL_FILE if journal is None else journal.path

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if is_computed(self.model):
            self._save_adapter(folder)
            return
        contents.save_model(folder, self.model, state_dict)
        if hasattr(self.model, "peft_config"):
            self.base = self.base or base_identity.identity_below(self.model)
            if self.base is not None:
                base_identity.save(folder, self.base)
        for name, content in self.model_files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            contents.save_json(folder / name, content)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        contents.save_json(folder / storage.ARGUMENTS, settings(self.args))

    def _save_adapter(self, folder: Path) -> None:
        """Of an engine's model the adapter alone: its tokenizer is in its file."""
        from zotune.training import gguf_models

        facts = adapter_facts(self.zo_optimizer)
        gguf_models.save(folder, self.model, facts, checkpoint_too=not self._in_checkpoint, chat=self.chats)
        contents.save_json(folder / storage.ARGUMENTS, settings(self.args))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        if trial is None:
            self.store_flos()
        if self.workers.first:
            self._write_checkpoint(run_folder, final)
        self.workers.wait()
        if not self.workers.first:
            self._update_state(run_folder, final)

    def _write_checkpoint(self, run_folder: Path, final: Path) -> None:
        check_in_place(run_folder)
        with storage.draft(final) as folder:
            self._in_checkpoint = True
            try:
                self.save_model(str(folder), _internal_call=True)
            finally:
                self._in_checkpoint = False
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_rng_state(str(folder))
            self._update_state(run_folder, final)
            self.state.save_to_json(str(folder / storage.TRAINER_STATE))
            storage.write_manifest(folder)
        storage.rotate(run_folder, self.args.save_total_limit, final, self.state.best_model_checkpoint)

    def _update_state(self, run_folder: Path, final: Path) -> None:
        """Updates the trainer's state with the best checkpoint and the callbacks, as Hugging Face does."""
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, saved = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(saved)
                else:
                    self.state.stateful_callbacks[name] = saved

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self.zo_optimizer
        mark = storage.journal_mark(self._journal_path, optimizer.steps) if optimizer.journal is not None else None
        extra = {"journal": mark, "since_log": self._since_log.to_dict(), "weights": dataclasses.asdict(self._weights_identity())}
        extra["training"] = self._determining()
        contents.save_optimizer(Path(output_dir), optimizer, **extra)
        contents.save_scheduler(Path(output_dir), self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        extra = contents.load_optimizer(Path(checkpoint_folder), self.zo_optimizer)
        identity.check_frozen(Path(checkpoint_folder), extra["weights"]["frozen"], self._weights_identity().frozen)
        self._since_log = StepSums(**extra["since_log"])
        contents.load_scheduler(Path(checkpoint_folder), self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        contents.save_rng(Path(output_dir))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            contents.load_rng(Path(checkpoint_folder))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: Hugging Face's loads a pickle, and no gradients are scaled."""

    def batch_by_options(self) -> resume_rules.Batch:
        """The examples of a step by the options."""
        size, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        return resume_rules.Batch(size, accumulation, self.args.train_batch_size * self.workers.size * accumulation)

    def _determining(self) -> dict[str, Any]:
        """The options that determine the run, for its journal and checkpoints."""
        batch = self._batch_of_run or self.batch_by_options()
        rows = f"{len(self.train_dataset)} examples" if has_length(self.train_dataset) else None
        objective = getattr(self, "objective", None)
        named = objective if isinstance(objective, str) else None
        rewards = getattr(self, "rewards", None)
        if rewards is not None:
            named = f"rewards {', '.join(rewards.names)}"
        return resume_rules.determining(self.args, batch=dataclasses.asdict(batch), train_dataset=rows, objective=named)

    def _weights_identity(self) -> identity.WeightsIdentity:
        """That of the run; what is not trained is read once."""
        if self._identity is None:
            trained = [parameter for group in self.zo_optimizer.param_groups for parameter in group["params"]]
            if isinstance(self.zo_optimizer, FirstOrder):  # of hybrid, the groups are those of the last blocks alone
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if isinstance(self.zo_optimizer, ZerothOrder):
                trained += [tensor for coordinate in self.zo_optimizer.forward.coordinates for tensor in coordinate.written()]
            self._identity = identity.identity_of(self.model, trained)
        return self._identity

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        then = schema.state_of(Path(resume_from_checkpoint)).weights.dtypes
        identity.check_dtypes(Path(resume_from_checkpoint), then, identity.dtypes_of(self.model))
        if is_computed(self.model):
            return  # its factors are in the optimizer's state
        self._anchor = self._anchored()
        with module_mode(self.model):
            if not self._load_offloaded(Path(resume_from_checkpoint)):
                with schema.refused(Path(resume_from_checkpoint)):
                    super()._load_from_checkpoint(resume_from_checkpoint, model)
                if hasattr(self.model, "peft_config"):
                    adapters.check_fit(self.model, Path(resume_from_checkpoint))

    def _anchored(self) -> Anchor | None:
        """The model's weights now as those that ``anchor_decay`` is toward, if there is one."""
        return Anchor(self.model, stored=StoredWeights(self.model)) if self.args.anchor_decay else None

    def _load_callback_state(self) -> None:
        # The best checkpoint is one of this run's folder, wherever the file of the state says that it was.
        best = self.state.best_global_step
        place = self._run_folder / f"checkpoint-{best}"
        self.state.best_model_checkpoint = str(place) if best and place.is_dir() else None
        super()._load_callback_state()

    def _load_best_model(self) -> None:
        best, optimizer = Path(self.state.best_model_checkpoint or ""), self.zo_optimizer
        storage.check_index(best)
        with module_mode(self.model):
            if not self._load_offloaded(best) and not is_computed(self.model):
                super()._load_best_model()
        if isinstance(optimizer, ZerothOrder) and keeps_factors(self.model):  # in no file of weights
            spent = optimizer.forward_passes, optimizer.sequences_evaluated
            contents.load_optimizer(best, optimizer)
            optimizer.forward_passes, optimizer.sequences_evaluated = spent

    def _load_offloaded(self, folder: Path) -> bool:
        """Loads an offloaded model one shard at a time, where Hugging Face gathers it whole; False for other models."""
        if stream_of(self.model) is None or not (folder / offloaded.INDEX).is_file():
            return False
        self._issue_warnings_after_load(offloaded.load_model(self.model, folder))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that does not fit is an error, not a warning."""
        missing = contents.truly_missing(self.model, load_result.missing_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit the model: it lacks {missing or 'nothing'} and has "
                f"{load_result.unexpected_keys or 'nothing'} that the model does not have; load the model of this run."
            )


def keeps_factors(model: nn.Module) -> bool:
    """Whether a model is trained by factors of quantized weights, which are in the optimizer's state alone."""
    return is_quantized(model) and not hasattr(model, "peft_config")
