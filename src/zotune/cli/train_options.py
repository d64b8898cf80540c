"""The options of `zotune train`: its help page, in the order in which one meets them."""

from __future__ import annotations

import dataclasses

from transformers import TrainingArguments

from zotune.methods import default
from zotune.training.config import ZOConfig
from zotune.training.schemes import Scheme

USAGE = "zotune train --model_name_or_path MODEL --task TASK --output_dir DIR [options]"
ABOUT = (
    "Fine-tunes a language model (or an encoder, with a classification head) with forward passes only. Every option can "
    "stand in a YAML file (--config run.yaml, lines such as `task: sst2`); flags override it."
)


def groups() -> dict[str, dict[str, str]]:
    """The options of `zotune train --help`, in order; an empty text takes the field's own."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    first = {
        "model_name_or_path": "",
        "task": "",
        "data_dir": "",
        "output_dir": "folder of the run: model, journal, checkpoints, summary.json, curve.png",
        "method": f"one of those that `zotune methods` lists (default {default().name})",
        "learning_rate": "a number, or auto (the default where it is known): measured now and then from a few losses",
        "eps": "size of the perturbation, or auto (the default): measured on the first batch",
        "max_steps": "training steps (default 1000)",
        "per_device_train_batch_size": "examples a step, for each process where several were launched",
        "seed": "of the directions, the order of the data and the subsets",
        "config": "",
        "resume_from_checkpoint": "continue the run in --output_dir from its newest checkpoint (true) or from a folder",
    }
    return {
        "first of all": first,
        "data": dict.fromkeys(
            ("train_file", "eval_file", "template", "options", "objective", "num_train", "num_dev", "num_eval", "k_shot",
             "num_demonstrations", "max_length", "truncate"), ""),
        "the method's options (its own defaults when not given)": {
            field.name: "" for field in dataclasses.fields(ZOConfig) if field.name not in inherited | first.keys()
        },
        "model and scheme": dict.fromkeys(
            (*(field.name for field in dataclasses.fields(Scheme)), "dtype", "attn_implementation", "trust_remote_code"), ""),
        "models larger than memory": dict.fromkeys(("offload", "max_memory", "offload_blocks", "offload_dir", "quantize"), ""),
        "the run": {
            "num_train_epochs": "instead of --max_steps",
            "gradient_accumulation_steps": "micro-batches a step, all evaluated under the same directions",
            "lr_scheduler_type": "constant, linear, cosine, ...",
            "weight_decay": "",
            "max_grad_norm": "",
            "activation_checkpointing": "first-order methods: keep no activations, run forwards again in the backward pass",
            "eval_steps": "steps between evaluations; below 1, a share of the run",
            "save_steps": "steps between checkpoints; below 1, a share of the run",
            "logging_steps": "",
            "report_to": "none, tensorboard, ...",
            "load_best_model_at_end": "end with the checkpoint that evaluated best",
            "use_cpu": "",
            "overwrite_output_dir": "",
        },
    }  # fmt: skip
