"""Countdown: a model learns to reach a target number from a reward, through which no gradient passes.

    python examples/countdown.py --model Qwen/Qwen2.5-0.5B-Instruct --output_dir DIR [--max_steps 300] [--generator reasoning-gym]

The reward is 1 for an expression of the given numbers, each used at most once, that equals the target, and 0.1 for one that does not.
`--generator reasoning-gym` takes the puzzles of that package (pip install reasoning-gym).
"""

import argparse
import ast
import importlib
import operator
import random
import re
from fractions import Fraction

from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
PROMPT = "Write an expression that equals {target}, of {numbers}, each used at most once, with + - * / and brackets.\nExpression:"


def puzzle(generator: random.Random, count: int = 4) -> dict:
    """Numbers, and the target that combining them one by one gives: a natural number below 1000."""
    numbers = [generator.randint(1, 50) for _ in range(count)]
    target = numbers[0]
    for number in numbers[1:]:
        found = [target + number, target - number, target * number] + [target // number] * (target % number == 0)
        target = generator.choice([value for value in found if 0 < value < 1000])
    return {"numbers": generator.sample(numbers, count), "target": target}


def rows(count: int, seed: int, source: str = "own") -> list[dict]:
    """Rows of a prompt, its numbers and its target."""
    puzzles = [puzzle(random.Random(f"{seed} {number}")) for number in range(count)]
    if source == "reasoning-gym":
        puzzles = [row["metadata"] for row in importlib.import_module("reasoning_gym").create_dataset("countdown", size=count, seed=seed)]
    return [{"prompt": PROMPT.format_map(each), "numbers": each["numbers"], "target": each["target"]} for each in puzzles]


def value_of(node: ast.AST, left: list[int]) -> Fraction:
    """The value of an expression of the numbers that are left; ValueError for anything else. Nothing is executed."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left, left), value_of(node.right, left))
    left.remove(getattr(node, "value", None))
    return Fraction(node.value)


def judged(text: str, numbers: list[int], target: int) -> float:
    """1 for an expression of the numbers that equals the target, 0.1 for another one, else 0."""
    try:
        plain = text if re.fullmatch(r"[0-9+\-*/() ]{1,200}", text) else ""
        return 1.0 if value_of(ast.parse(plain, mode="eval").body, list(numbers)) == target else 0.1
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0


def countdown_reward(completions: list[str], numbers: list[list[int]], target: list[int]) -> list[float]:
    """Rewards of the first lines."""
    return [judged(text.strip().partition("\n")[0].strip(), *row) for text, *row in zip(completions, numbers, target, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--output_dir", default="countdown")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--generator", choices=["own", "reasoning-gym"], default="own")
    options = parser.parse_args()
    method = {"method": "lozo-e", "estimator": "central", "num_directions": 1, "interval": 1, "max_steps": options.max_steps}
    args = zotune.ZOConfig(options.output_dir, per_device_train_batch_size=8, max_completion_length=32, **method)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    data = {"train_dataset": rows(1000, 0, options.generator), "eval_dataset": rows(100, 1, options.generator)}
    trainer = zotune.ZOTrainer(model, args, reward_funcs=[countdown_reward], processing_class=tokenizer, **data)
    trainer.train()
    print(trainer.evaluate())
