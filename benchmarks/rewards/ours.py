"""A method of zotune by rewards, through `ZOTrainer(reward_funcs=...)`; with `--loss`, by the loss of the right word instead."""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import record
import tasks
from transformers import TrainerCallback

import zotune

#: Prompts a step and options of each method: 64 rows a step (population 30 for es as published: 240).
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "es": (8, {"num_directions": 4}),
    "es-ranks": (8, {"num_directions": 4}),
    "lozo": (32, {}),
    "lozo-z": (8, {"method": "lozo", "num_directions": 4, "fitness": "z-score"}),
    "lozo-e": (16, {}),
    "agzo": (32, {}),
}


#: The word of either label that the loss is of.
WORDS = (" terrible", " good")


def number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def arguments() -> argparse.Namespace:
    parser = record.arguments(__doc__, number_or_auto)
    parser.add_argument("--method", required=True, choices=list(SETTINGS))
    parser.add_argument("--eps", type=number_or_auto, default=0.03)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of ZOConfig, JSON")
    parser.add_argument("--loss", action="store_true", help="accuracy: the loss of the word of the right side, in place of the reward")
    parser.add_argument("--prompts", type=int, help="prompts a step")
    parser.add_argument("--rows", type=int, default=record.ROWS, help="completions a step")
    parser.add_argument("--name", help="in the table; default: the method")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    model, tokenizer = record.load_model(args.model)
    task = tasks.load(args.task, args.model, args.data_dir, args.out)
    prompts, options = SETTINGS[args.method]
    prompts, options = args.prompts or prompts, {"method": args.method, **options, **args.options}
    log = record.Record(args, task, args.name or args.method, tokenizer, eps=args.eps, prompts=prompts, options=options)
    log.evaluate(model)
    count, scored = [0], [0.0, 0]

    def reward(completion_ids: list[Any], **given: Any) -> list[float]:
        scores = task.reward(**given)
        count[0] += sum(len(ids) for ids in completion_ids)
        scored[0], scored[1] = scored[0] + sum(scores), scored[1] + len(scores)
        return scores

    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if loss:  # as many sequences as with a reward
                count[0] = rows * task.max_new_tokens
            going = log.step(model, count[0], scored[0] / max(1, scored[1]))
            count[0], scored[:] = 0, [0.0, 0]
            control.should_training_stop = control.should_training_stop or not going

    loss, rows = args.loss, args.rows
    data = [{"prompt": row["prompt"], "completion": WORDS[row["label"]]} for row in task.train] if loss else task.train
    steps = max(1, log.budget // (args.rows * task.max_new_tokens))
    with tempfile.TemporaryDirectory() as folder:
        config = zotune.ZOConfig(
            output_dir=folder, learning_rate=args.learning_rate, eps=args.eps, max_steps=steps, per_device_train_batch_size=prompts,
            seed=args.seed, use_cpu=True, logging_strategy="no", save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
            **({} if loss else {"max_completion_length": task.max_new_tokens, "log_completions": False}), **options,
        )  # fmt: skip
        trainer = zotune.ZOTrainer(
            model, config, reward_funcs=None if loss else reward, train_dataset=data, processing_class=tokenizer, callbacks=[Evaluate()]
        )
        trainer.train()
        print("learning rate", trainer.optimizer.param_groups[0]["lr"], "steps", trainer.state.global_step)
    if log.tokens < log.budget and log.tokens:
        log.evaluate(trainer.model.eval())


if __name__ == "__main__":
    record.for_each_seed(run, arguments())
