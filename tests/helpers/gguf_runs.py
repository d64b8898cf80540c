"""Command lines that train a GGUF file, and what is read of their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from zotune.training.arguments import ModelArguments
from zotune.training.loading import load_model, load_tokenizer, plan_model

TASK = ["--task", "sst2", "--data_dir", "data", "--num_train", "24", "--num_eval", "12"]
STEPS = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--per_device_train_batch_size", "8"]
RUN = ["--model_name_or_path", "base.gguf", "--n_threads", "1", *TASK, *STEPS, "--seed", "3"]
#: Cheap steps: nothing is measured.
LOZO = ["--method", "lozo", "--learning_rate", "1e-3", "--eps", "1e-2"]
SHORT = ["--model_name_or_path", "base.gguf", "--n_threads", "1", *LOZO, "--max_steps", "1", "--per_device_train_batch_size", "4"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
PROMPT = "the film is warm"


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def loaded(path: Path | str, **options: Any) -> tuple[Any, Any]:
    """The model of a file or folder, and its tokenizer."""
    args = ModelArguments(str(path), **{"n_threads": 1, **options})
    plan = plan_model(args, "test")
    tokenizer = load_tokenizer(plan, args)
    return load_model(plan, args, torch.device("cpu"))[0], tokenizer
