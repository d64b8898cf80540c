"""`zotune train`: one run on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import TrainingArguments

from zotune.cli.console import ConsoleObserver
from zotune.cli.parser import help_page
from zotune.cli.push import push_run
from zotune.memory.offload_needs import needs_of
from zotune.methods import default
from zotune.publishing import Upload
from zotune.training import run_config
from zotune.training.arguments import GGUF_OPTIONS
from zotune.training.config import ZOConfig
from zotune.training.given_options import ATTRIBUTE_FIELDS
from zotune.training.quiet import quiet_libraries
from zotune.training.reward_options import REWARD_FIELDS
from zotune.training.run import run
from zotune.training.schemes import Scheme

USAGE = "zotune train --model_name_or_path MODEL --task TASK --output_dir DIR [options]"
ABOUT = (
    "Fine-tunes a language model (or an encoder, with a classification head) with forward passes only. Every option can "
    "stand in a YAML file (--config run.yaml, lines such as `task: sst2`); flags override it."
)


def main(argv: Sequence[str]) -> int:
    """Runs `zotune train`."""
    quiet_libraries()
    if {"-h", "--help", "--help-all"} & set(argv):
        everything = "--help-all" in argv
        print(help_page(run_config.option_parser(), USAGE, ABOUT, option_groups(), everything=everything))
        if not everything:
            print("\n`zotune train --help-all` lists every option, those of transformers.TrainingArguments among them.")
        return 0
    config = run_config.parse(argv)
    to = destination(config)
    result = run(config, ConsoleObserver(), needs_of)
    if to is not None:
        print(f"{to.repo}: {push_run(result.folder, to)}")
    return 0


def destination(config: run_config.RunConfig) -> Upload | None:
    """Where the first process pushes the finished run, created before anything is trained; None where it is not pushed."""
    training = config.training
    if not config.push or not training.should_save:
        return None
    to = Upload(str(training.hub_model_id), private=bool(training.hub_private_repo), revision=training.hub_revision)
    to.create()
    return to


def option_groups() -> dict[str, dict[str, str]]:
    """The options of `zotune train --help`, in order; an empty text stands for the field's own help."""
    elsewhere = {*REWARD_FIELDS, *ATTRIBUTE_FIELDS}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    first = {
        "model_name_or_path": "",
        "task": "",
        "data_dir": "",
        "output_dir": "folder of the run: model, journal, checkpoints, summary.json, curve.png",
        "method": f"one of those that `zotune methods` lists (default {default().name})",
        "learning_rate": "a number, or auto (the default where it is known): measured from a few losses",
        "eps": "size of the perturbation, or auto (the default): measured on the first batch",
        "max_steps": "training steps (default 1000)",
        "per_device_train_batch_size": "examples per step and process",
        "seed": "of the directions, the order of the data and the subsets",
        "config": "",
        "resume_from_checkpoint": "continue the run in --output_dir from its newest checkpoint (true) or from a folder",
    }
    return {
        "first of all": first,
        "data": dict.fromkeys(
            ("train_file", "eval_file", "columns", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
             "streaming", "template", "options", "objective", "loss_over", "problem_type", "num_train", "num_dev", "num_eval",
             "k_shot", "num_demonstrations", "demonstrations_per", "bos_token", "max_length", "truncate", "packing", "tools",
             "chat_template_kwargs"), ""),
        "rewards of generated completions": dict.fromkeys(("reward", *REWARD_FIELDS, "guard_task", "guard_file"), ""),
        "shares of training examples (zotune influence)": dict.fromkeys(("attribute", *ATTRIBUTE_FIELDS), ""),
        "the method's options (its own defaults when not given)": {
            field.name: "" for field in dataclasses.fields(ZOConfig) if field.name not in inherited | first.keys() | elsewhere
        },
        "model and scheme": dict.fromkeys(
            (*(field.name for field in dataclasses.fields(Scheme)), "dtype", "attn_implementation", "trust_remote_code"), ""),
        "models larger than memory": dict.fromkeys(("offload", "max_memory", "offload_blocks", "offload_dir", "quantize"), ""),
        "a GGUF file, computed by llama.cpp": dict.fromkeys(GGUF_OPTIONS, ""),
        "the run": {
            "protocol": "",
            "num_train_epochs": "instead of --max_steps",
            "gradient_accumulation_steps": "micro-batches per step, all evaluated under the same directions",
            "lr_scheduler_type": "constant, linear, cosine, ...",
            "weight_decay": "",
            "max_grad_norm": "",
            "activation_checkpointing": "first-order methods: recompute activations in the backward pass",
            "eval_steps": "steps between evaluations; below 1, a share of the run",
            "save_steps": "steps between checkpoints; below 1, a share of the run",
            "logging_steps": "",
            "report_to": "none, tensorboard, trackio, wandb, ...: where the figures of the log go, too",
            "load_best_model_at_end": "end with the checkpoint that evaluated best",
            "use_cpu": "",
            "overwrite_output_dir": "",
            "push_to_hub": "",
            "hub_model_id": "the repository of --push_to_hub: user/name",
            "hub_private_repo": "make a new repository private",
        },
    }  # fmt: skip
