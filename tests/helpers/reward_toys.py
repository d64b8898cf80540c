"""A letter-writing model and the loss of its rewarded completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zotune.forward.generation import Sampling
from zotune.rewards import Rewards
from zotune.rewards.objective import RewardLoss

LETTERS, PROMPTS, NEW = "abcdefghijklmnop", 4, 6


class Tokenizer:
    """Letters as tokens."""

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        return ["".join(LETTERS[token] for token in row) for row in rows]


def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), pad_token_id=0, eos_token_id=None, bos_token_id=None, **sizes))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made.eval()


def batch() -> dict[str, Any]:
    ids = torch.randint(1, len(LETTERS), (PROMPTS, 5), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5) >= torch.arange(PROMPTS).unsqueeze(1)).long()
    rows = [{"prompt": f"prompt {number}", "columns": {"wanted": "f"}} for number in range(PROMPTS)]
    return {"prompt_ids": ids * mask, "prompt_mask": mask, "prompt_number": torch.arange(PROMPTS), "rows": rows}


def share(prompts: list[str], completions: list[str], wanted: list[str], **columns: Any) -> list[float]:
    """The share of letters that come before the wanted one in the alphabet."""
    return [sum(letter <= last for letter in text) / len(text) for text, last in zip(completions, wanted, strict=True)]


def loss_of(trained: torch.nn.Module, reward: Any = share, *, kv_cache: int = 10**9, **sampling: Any) -> RewardLoss:
    return RewardLoss(trained, Tokenizer(), Rewards([reward]), Sampling(NEW, (), **sampling), kv_cache)
