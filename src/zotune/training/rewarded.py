"""Rewards in a trainer: its prompts, the loss of their completions, and the loss of evaluations, which are greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zotune.forward.generation import Sampling
from zotune.io.sizes import parse_size
from zotune.rewards.calls import RewardFunction
from zotune.rewards.data import PromptData, end_of_text
from zotune.rewards.functions import Rewards
from zotune.rewards.objective import KV_CACHE, RewardLoss
from zotune.tasks.encoding import pad_token_id
from zotune.training.config import ZOConfig
from zotune.training.raw_text import tokenizer_of


class TrainerRewards:
    """The rewards of a trainer.

    Args:
        model: a causal language model.
        args: its options of rewards.
        functions: reward functions, or names of them.
        options: the trainer's arguments behind model and args, by name.
        stops: tokens that end a completion, of data sets that are encoded already.

    Attributes:
        options: the trainer's arguments, with prompts encoded and their collator.
        loss: of training steps.
        evaluation: of evaluations: the same rewards of greedy completions.

    Raises:
        ValueError: no model or tokenizer, an option that makes no sense beside rewards, or a data set that cannot be encoded.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: ZOConfig,
        functions: RewardFunction | str | Sequence[RewardFunction | str],
        options: Mapping[str, Any],
        stops: Sequence[int] = (),
    ) -> None:
        if model is None:
            raise ValueError("rewards need the model itself: pass model, not model_init.")
        self.seed = args.seed
        tokenizer = tokenizer_of(options.get("processing_class"))
        data = PromptData(tokenizer, model, args.max_completion_length)
        self.options = dict(options)
        for name in ("train_dataset", "eval_dataset"):
            self.options[name] = data.encoded(options.get(name), name)
        self.options["data_collator"] = options.get("data_collator") or data.collator
        ends = tuple(stops) or data.stops or _ends(tokenizer, model)
        rewards = Rewards(functions, args.reward_weights, args.max_failed_rewards)
        kv_cache = KV_CACHE if args.kv_cache_memory is None else parse_size(args.kv_cache_memory)

        def loss(temperature: float, top_p: float, top_k: int, samples: int) -> RewardLoss:
            sampling = Sampling(args.max_completion_length, ends, pad_token_id(tokenizer), temperature, top_p, top_k, samples)
            return RewardLoss(model, tokenizer, rewards, sampling, kv_cache)

        self.loss = loss(args.temperature, args.top_p, args.top_k, args.num_generations)
        self.evaluation = loss(0.0, 1.0, 0, 1)

    def step(self, batches: Sequence[Mapping[str, Any]], step: int) -> tuple[RewardLoss, list[dict[str, Any]]]:
        """The loss of a step, and its micro-batches with the keys of their noise."""
        return self.loss, [self.loss.keyed(batch, self.seed, step) for batch in batches]


def _ends(tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    of_model = end_of_text(model)
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])]
    return tuple(dict.fromkeys(int(end) for end in ends if end is not None))
