"""TRL's `GRPOTrainer` in float32 on the CPU; needs `pip install trl`.

Its defaults, but for the learning rate, the batch (64 completions a step, 8 a prompt) and `gradient_checkpointing`, which may be asked for.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import record
import tasks
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0: all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    record.for_each_seed(run, parser.parse_args())


def run(args: argparse.Namespace) -> None:
    model, tokenizer = record.load_model(args.model)
    task = tasks.load(args.task, args.model, args.data_dir, args.out)
    name = "grpo-lora" if args.lora else "grpo"
    log = record.Record(args, task, name, tokenizer, lora=args.lora, gradient_checkpointing=args.gradient_checkpointing)
    log.evaluate(model)
    steps = -(-log.budget // (record.ROWS * task.max_new_tokens))
    rows = [row for step in range(steps) for row in tasks.rows_of_step(task, args.seed, step, record.ROWS // 8)]
    seen: dict[str, float] = {}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[Any], **kept: Any) -> list[float]:
        named = {column: values for column, values in kept.items() if column in rows[0]}
        scores = task.reward(prompts=prompts, completions=completions, **named)
        seen["tokens"], seen["reward"] = sum(len(ids) for ids in completion_ids), sum(scores) / len(scores)
        return scores

    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            training = model.training
            going = log.step(model.eval(), int(seen["tokens"]), seen["reward"])
            model.train(training)
            control.should_training_stop = control.should_training_stop or not going

    adapter = None
    if args.lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, learning_rate=args.learning_rate, per_device_train_batch_size=record.ROWS, num_generations=8,
            max_completion_length=task.max_new_tokens, max_steps=steps, seed=args.seed, shuffle_dataset=False, bf16=False, use_cpu=True,
            gradient_checkpointing=args.gradient_checkpointing, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter,
            callbacks=[Evaluate()],
        )  # fmt: skip
        trainer.train()
    if log.tokens < log.budget:
        log.evaluate(trainer.model.eval())


if __name__ == "__main__":
    main()
