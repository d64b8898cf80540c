"""What every method of the comparison shares: arguments, greedy evaluation on held-out prompts, a JSON line per evaluation, memory."""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tasks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

#: Generated tokens of a run, by task.
BUDGET = {"sentiment": 20_480, "word": 20_480, "accuracy": 2_560}
#: Prompts a step and completions of each: 64 rows.
PROMPTS, ROWS = 8, 64


def arguments(doc: str, rate: Callable[[str], Any] = float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--task", required=True, choices=list(BUDGET))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    parser.add_argument("--learning_rate", type=rate, required=True)
    parser.add_argument("--part", type=float, default=1.0, help="part of the token budget; below 1: a run to choose the rate by")
    parser.add_argument("--evaluations", type=int, default=4)
    return parser


def load_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> tuple[list[str], int]:
    """Greedy completions, and how many tokens they are."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        rows = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    rows = rows[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), int((rows != tokenizer.pad_token_id).sum())


def memory(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def for_each_seed(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    for seed in args.seeds:
        args.seed = seed
        run(args)


class Record:
    """Evaluations of a run, a JSON line each. Seconds and memory are those of training alone.

    Args:
        method: its name in the table. settings: what is recorded with each line.
    """

    def __init__(
        self, args: argparse.Namespace, task: tasks.Task, method: str, tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> None:
        self.args, self.task, self.method, self.tokenizer, self.settings = args, task, method, tokenizer, settings
        args.out.mkdir(parents=True, exist_ok=True)
        self.budget = int(BUDGET[task.name] * args.part)
        self.tokens = self.steps = 0
        self.cpu = self.wall = 0.0
        self.peak, self.loaded = 0.0, memory("VmRSS")
        self.train_rewards: list[float] = []
        self._due = self.budget / args.evaluations
        self._resume()

    def _resume(self) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _pause(self) -> None:
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall
        self.peak = max(self.peak, memory("VmHWM") - self.loaded)

    def _known_base(self) -> bool:
        """Whether an earlier run has evaluated the model before training, which is the same for all."""
        path = self.args.out / "results.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        found = any(line["task"] == self.task.name and not line["tokens"] for line in lines)
        if found:
            self._resume()
        return found

    def step(self, model: PreTrainedModel, tokens: int, reward: float) -> bool:
        """Count a step's generated tokens; evaluate when due; False when the budget is used up."""
        self.tokens += tokens
        self.steps += 1
        self.train_rewards.append(reward)
        if self.tokens >= self._due or self.tokens >= self.budget:
            self._due += self.budget / self.args.evaluations
            self.evaluate(model)
        return self.tokens < self.budget

    def evaluate(self, model: PreTrainedModel) -> float:
        """Mean reward of greedy completions of the held-out prompts, written as a line; before training once for all runs."""
        if self.tokens:
            self._pause()
        elif self._known_base():
            return 0.0
        rows, completions = self.task.held_out, []
        for start in range(0, len(rows), 128):
            prompts = [row["prompt"] for row in rows[start : start + 128]]
            completions += generate(model, self.tokenizer, prompts, self.task.max_new_tokens)[0]
        rewards = self.task.reward(prompts=[row["prompt"] for row in rows], completions=completions, **tasks.columns(rows))
        reward = sum(rewards) / len(rewards)
        line = {
            "task": self.task.name,
            "method": self.method,
            "seed": self.args.seed,
            "part": self.args.part,
            "learning_rate": self.args.learning_rate,
            **self.settings,
            "tokens": self.tokens,
            "steps": self.steps,
            "cpu_seconds": round(self.cpu, 2),
            "wall_seconds": round(self.wall, 2),
            "reward": reward,
            "train_reward": sum(self.train_rewards) / max(1, len(self.train_rewards)),
            "distinct": len(set(completions)) / len(completions),
            "peak_mib": round(self.peak, 1),
            "shown": completions[:3],
        }
        self.train_rewards.clear()
        with (self.args.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{self.task.name} {self.method} seed {self.args.seed} rate {self.args.learning_rate} tokens {self.tokens} reward {reward:.4f} "
            f"cpu {self.cpu:.1f} s wall {self.wall:.1f} s peak {self.peak:.0f} MiB {completions[:2]}",
            flush=True,
        )
        self._resume()
        return reward
