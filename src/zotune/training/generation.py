"""Greedy generation of answers for a batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from zotune.objectives.token_logprobs import IGNORE


@torch.no_grad()
def greedy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Token ids that a model writes behind each prompt, the most likely one at every place: (B, S), -100 after an answer's end.

    Args:
        model: a causal language model of transformers (or PEFT), with its own ``generate``.
        batch: prompt_ids (B, P) and prompt_mask (B, P), padded on the left; max_new_tokens (B,), stop_ids (B, E) and pad_id (B,), the
            same for every example.

    Raises:
        ValueError: the model cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(f"{type(model).__name__} has no generate(), which this task's answers need: use a causal language model.")
    prompts = batch["prompt_ids"]
    stops = batch["stop_ids"][0].tolist()
    # The model's own generation settings (sampling, penalties, lengths) are those of a chat, not of an evaluation.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=int(batch["max_new_tokens"][0]),
        eos_token_id=stops or None,
        pad_token_id=int(batch["pad_id"][0]),
    )
    written = generate(input_ids=prompts, attention_mask=batch["prompt_mask"], generation_config=settings)[:, prompts.shape[1] :]
    ended = torch.isin(written, torch.tensor(stops, dtype=written.dtype, device=written.device))
    behind = ended.cumsum(dim=1) - ended.long() > 0
    return written.masked_fill(behind, IGNORE)
