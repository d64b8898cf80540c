"""Which options may change when a run resumes: a rule for every option (:data:`RULES`), and what differs.

A step is determined by the options that must be equal, the examples of a step and the weights. Whether a run resumes from a checkpoint or
from its journal alone, the same options are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from zotune.training.checkpoint.schema import Batch as Batch
from zotune.training.config import settings


class Rule(Enum):
    """What resuming does with an option that differs from the run's."""

    EQUAL = "must be equal; another value is refused"
    BATCH = "may change while a step takes the same number of examples"
    EXAMPLES = "may change while the training examples stay the same"
    WEIGHTS = "may change while the base model's weights stay the same"
    FREE = "may change; the change is recorded in `zotune_run.json` and `summary.json`"
    START = "of one start only; not compared"


#: The options by rule, in the order of the documents' table.
OPTIONS: Mapping[Rule, str] = {
    Rule.EQUAL: """
        method eps num_directions directions_per group_size direction estimator fitness rank interval momentum update_rule update_rule_args
        method_args learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay anchor_decay max_grad_norm
        label_smoothing_factor adam_beta1 adam_beta2 adam_epsilon optim optim_args optim_target_modules neftune_noise_alpha
        dp_epsilon dp_noise_multiplier dp_clip dp_delta dp_neighbors
        seed data_seed train_sampling_strategy length_column_name dataloader_drop_last ignore_data_skip average_tokens_across_devices
        attn_implementation quantize n_ctx n_ubatch cache_type tokenizer_name
        task template options objective loss_over problem_type num_train num_dev k_shot num_demonstrations demonstrations_per bos_token
        max_length truncate packing streaming tools chat_template_kwargs
        reward reward_weights max_completion_length num_generations temperature top_p top_k
        attribute attribute_every attribute_examples
        scheme lora_r lora_alpha lora_dropout lora_target_modules num_virtual_tokens trainable
        bf16 fp16 tf32 use_liger_kernel liger_kernel_config
        """,
    Rule.BATCH: "per_device_train_batch_size gradient_accumulation_steps",
    Rule.EXAMPLES: "data_dir train_file dataset_name dataset_config dataset_train_split columns",
    Rule.WEIGHTS: "model_name_or_path dtype",
    Rule.FREE: """
        max_steps num_train_epochs max_nonfinite_steps forward_batching parallelism check_workers_steps
        per_device_eval_batch_size eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
        eval_use_gather_object batch_eval_metrics prediction_loss_only include_for_metrics bf16_full_eval fp16_full_eval
        load_best_model_at_end metric_for_best_model greater_is_better eval_file dataset_test_split num_eval guard_task guard_file
        save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
        logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node include_num_input_tokens_seen
        log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
        n_threads n_gpu_layers max_failed_rewards kv_cache_memory log_completions num_completions_to_print
        use_cpu offload max_memory offload_blocks offload_dir trust_remote_code
        accelerator_config parallelism_config fsdp fsdp_config deepspeed
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs use_cache
        torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps auto_find_batch_size
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        full_determinism debug skip_memory_metrics do_train do_eval do_predict
        """,
    Rule.START: "output_dir overwrite_output_dir resume_from_checkpoint restore_callback_states_from_checkpoint local_rank",
}
RULES: Mapping[str, Rule] = {name: rule for rule, names in OPTIONS.items() for name in names.split()}


def determining(config: TrainingArguments, **more: Any) -> dict[str, Any]:
    """The options of a config that must be equal, as plain JSON, and ``more`` that must be; for a journal and a checkpoint."""
    values = settings(config)
    return {name: value for name, value in values.items() if RULES.get(name) is Rule.EQUAL} | more


def micro_batch(place: Path, then: Batch, now: Batch, processes: int) -> int:
    """Examples of a micro-batch, of all processes together, with which a resumed run takes the steps of the run at ``place``.

    With the options of the run its batch stays, with any number of processes.

    Raises:
        ValueError: the options make steps of another number of examples.
    """
    same_options = now.per_device * now.accumulation == then.per_device * then.accumulation
    if not (same_options or now.examples == then.examples) or then.examples % now.accumulation:
        raise ValueError(
            f"{place}: a step of the run takes {then.examples} examples (per_device_train_batch_size={then.per_device}, "
            f"gradient_accumulation_steps={then.accumulation}), and with {now.per_device} and {now.accumulation} in {processes} "
            f"process{'es' * (processes > 1)} it would take {now.examples}: resume with the run's, or with others of the same product."
        )
    return then.examples // now.accumulation


def differing(then: Mapping[str, Any], now: Mapping[str, Any], rule: Rule) -> dict[str, tuple[Any, Any]]:
    """The options of a rule that both name and that differ: name → (then, now)."""
    both = [name for name in now if name in then and RULES.get(name, Rule.EQUAL) is rule]
    return {name: (then[name], now[name]) for name in both if then[name] != now[name]}


def check_equal(place: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError where options that must be equal are not those of the run at ``place``."""
    found = differing(then, now, Rule.EQUAL)
    found.pop("batch", None)  # :func:`micro_batch` compares it
    if found:
        changes = [f"{name} was {was!r} and is {value!r}" for name, (was, value) in found.items()]
        more = f", and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise ValueError(
            f"{place}: the run cannot be resumed with other options: {'; '.join(changes[:4])}{more}. Resume with the run's own, or start "
            "a new run in another output_dir (from this one's weights: model_name_or_path)."
        )
