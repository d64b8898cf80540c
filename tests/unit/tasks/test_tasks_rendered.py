"""Every template of every task on real rows, pinned in tests/data/rendered, and every task from its rows to its metrics."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rendered_tasks import FOLDER, path_of, rendered
from zotune import objectives, tasks
from zotune.tasks.template import columns_of
from zotune.training.config import ZOConfig
from zotune.training.trainer import ZOTrainer

NAMES = tasks.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_template_renders_real_rows_as_pinned(name, data_dir):
    assert rendered(name, data_dir) == json.loads(path_of(name).read_text(encoding="utf-8"))


def test_a_file_for_every_task():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_template_is_the_columns_and_nothing_else(name, data_dir):
    task = tasks.load(name, template="none")
    row = tasks.load_rows(task, "eval", data_dir)[0]
    prompt, _ = task.render(row)
    assert prompt == " ".join(str(row[column]).strip() for column in columns_of(task.prompt))
    assert task.prompt.replace("{", "").replace("}", "").split() == list(columns_of(task.prompt))


@pytest.fixture(scope="module")
def loaded(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm), AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_goes_from_rows_to_metrics(name, loaded, data_dir, tmp_path):
    tokenizer, model = loaded
    # A short length cuts the prompts' beginnings: what is tested is the way, not the figure.
    data = tasks.prepare(
        tokenizer, model.config, task=name, data_dir=data_dir, num_train=2, num_dev=1, num_eval=3, max_length=128, truncate=True
    )
    assert (len(data.train), len(data.dev), len(data.eval)) == (2, 1, 3)
    args = ZOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = ZOTrainer(
        model=model,
        args=args,
        objective=data.train_objective,
        eval_objective=data.eval_objective,
        eval_data_collator=data.collate_eval,
        compute_metrics=data.compute_metrics,
    )
    found = trainer.predict(data.eval, metric_key_prefix="test").metrics
    assert {f"test_{metric}" for metric in data.task.metrics} <= set(found)
    assert all(0 <= found[f"test_{metric}"] <= 1 for metric in data.task.metrics)
    assert found["test_loss"] > 0
    with torch.inference_mode():
        losses = objectives.objective(data.train_objective, model)(data.collate_train(data.train))
    assert losses.shape == (2,) and losses.isfinite().all()
