"""Rewards in a trainer: its prompts, the loss of their completions, and the loss of evaluations, which are greedy."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zotune.forward.generation import Sampling
from zotune.io.sizes import parse_size
from zotune.methods import Method
from zotune.optim.distributed import Workers
from zotune.rewards.calls import RewardFunction
from zotune.rewards.data import PromptData, end_of_text
from zotune.rewards.evaluation import RewardMetrics, Shown, evaluated
from zotune.rewards.functions import Rewards
from zotune.rewards.objective import KV_CACHE, RewardLoss
from zotune.tasks.encoding import pad_token_id
from zotune.training.config import ZOConfig
from zotune.training.raw_text import tokenizer_of
from zotune.training.reward_options import check_rewarded

logger = logging.getLogger(__name__)


class TrainerRewards:
    """The rewards of a trainer.

    Args:
        model: a causal language model.
        args: its options of rewards.
        functions: reward functions, or names of them.
        options: the trainer's arguments behind model and args, by name.

    Attributes:
        options: the trainer's arguments, with prompts encoded, their collator and metrics.
        loss: of training steps.
        evaluation: of evaluations: the same rewards of greedy completions.
        names: of the reward functions.
        shown: a few completions of the last evaluation, those of its first prompts.

    Raises:
        ValueError: no model or tokenizer, an option that makes no sense beside rewards, or a data set that cannot be encoded.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: ZOConfig,
        functions: RewardFunction | str | Sequence[RewardFunction | str],
        options: Mapping[str, Any],
    ) -> None:
        if model is None:
            raise ValueError("rewards need the model itself: pass model, not model_init.")
        self.seed = args.seed
        tokenizer = tokenizer_of(options.get("processing_class"))
        data = PromptData(tokenizer, model, args.max_completion_length)
        self.options = dict(options)
        for name in ("train_dataset", "eval_dataset"):
            self.options[name] = data.encoded(options.get(name), name)
        collator = self.options["data_collator"] = options.get("data_collator") or data.collator
        stops = (*getattr(collator, "stops", ()), tokenizer.eos_token_id, *end_of_text(model))
        ends = tuple(dict.fromkeys(int(stop) for stop in stops if stop is not None))
        rewards = Rewards(functions, args.reward_weights, args.max_failed_rewards)
        self.names = rewards.names
        train = self.options["train_dataset"]
        if train is not None and len(train):
            rewards.check(train[0]["columns"])
        for name in ("train_dataset", "eval_dataset"):
            found = self.options[name]
            if isinstance(found, list) and found:
                rewards.check_rows([example["columns"] for example in found], name)
        self.options["compute_metrics"] = options.get("compute_metrics") or RewardMetrics(self.names)
        self.shown: list[Shown] = []
        self._warned = False
        self._most = args.num_completions_to_print if args.log_completions else 0
        kv_cache = KV_CACHE if args.kv_cache_memory is None else parse_size(args.kv_cache_memory)

        def loss(temperature: float, top_p: float, top_k: int, samples: int) -> RewardLoss:
            sampling = Sampling(args.max_completion_length, ends, pad_token_id(tokenizer), temperature, top_p, top_k, samples)
            return RewardLoss(model, tokenizer, rewards, sampling, kv_cache)

        self.loss = loss(args.temperature, args.top_p, args.top_k, args.num_generations)
        self.evaluation = loss(0.0, 1.0, 0, 1)

    def evaluates_by(self, method: Method) -> None:
        """Have the statistics compare the completions of the points that the steps of a method evaluate."""
        self.loss.statistics.points = 2 if method.estimator == "central" else method.num_points

    def step(self, batches: Sequence[Mapping[str, Any]], step: int) -> tuple[RewardLoss, list[dict[str, Any]]]:
        """The loss of a step, and its micro-batches with the keys of their noise."""
        return self.loss, [self.loss.keyed(batch, self.seed, step) for batch in batches]

    def entries(self, logs: Mapping[str, float], workers: Workers) -> dict[str, float]:
        """What a log entry says of the completions of all processes since the last one."""
        count = self.loss.statistics.count
        found = self.loss.statistics.take()
        if workers.several:
            found = pooled([part for part in workers.exchange((count, found)) if part[0]])
        if logs.get("loss_diff") == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "since the last log entry every point of a step had the same reward, so nothing was learned: check that the reward tells "
                "completions apart (one that is 0 almost always needs easier prompts or partial credit), or raise eps."
            )
        if "loss" in logs:
            found["reward"] = 0.0 - logs["loss"]  # of all steps since, also of those before a resumption
        return found

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The table of a batch of prompts at the weights as they are; see :func:`zotune.rewards.evaluation.evaluated`."""
        table, shown = evaluated(self.evaluation, batch)
        by_number = {each.number: each for each in (*self.shown, *shown)}  # processes of unequal parts have some prompts twice
        self.shown = [by_number[number] for number in heapq.nsmallest(self._most, by_number)]
        return table.to(batch["prompt_ids"].device)


def pooled(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Statistics of all completions from those of parts: pairs of their number of completions and statistics."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for _, part in parts for name in part):
        known = [(count, part[name]) for count, part in parts if name in part and math.isfinite(part[name])]
        total = sum(count for count, _ in known)
        if name == "failed_rewards":
            found[name] = sum(value for _, value in known)
        elif total:
            found[name] = sum(count * value for count, value in known) / total
    if "reward_std" in found:  # the variance within the parts and between them
        judged = [(count, part["reward"], part["reward_std"]) for count, part in parts if math.isfinite(part["reward"])]
        second = sum(count * (mean**2 + std**2) for count, mean, std in judged) / max(1, sum(count for count, *_ in judged))
        found["reward_std"] = math.sqrt(max(0.0, second - found["reward"] ** 2))
    return found


def rewards_of(
    model: nn.Module | None,
    args: ZOConfig,
    functions: RewardFunction | str | Sequence[RewardFunction | str] | None,
    options: dict[str, Any],
) -> tuple[TrainerRewards | None, dict[str, Any]]:
    """The rewards of a trainer, None without reward functions, and its arguments behind model and args.

    Raises:
        ValueError: see :class:`TrainerRewards`; an option of rewards is given without any.
    """
    if functions is None:
        check_rewarded(args)
        return None, options
    rewards = TrainerRewards(model, args, functions, options)
    return rewards, rewards.options
