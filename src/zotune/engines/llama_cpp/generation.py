"""Greedy generation: all prompts of a group as sequences of one context, a token each at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zotune.engines.engine import Row
from zotune.engines.llama_cpp.context import Context, grouped


def greedy(context: Context, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int]) -> list[list[int]]:
    """Continuations of the prompts, each up to and with its first stop token, or of ``max_new_tokens``.

    Raises:
        ValueError: a prompt is empty, or leaves no room in the context.
    """
    rows = []
    for prompt in prompts:
        if not 0 < len(prompt) <= context.longest - max_new_tokens:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, and with {max_new_tokens} new ones the context takes {context.longest}: cut prompts "
                "with --max_length, or raise --n_ctx where the model was trained for more."
            )
        ids = np.array(prompt, np.int32)
        rows.append(Row(ids, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32), np.array([len(ids) - 1])))
    found: list[list[int]] = []
    for group in grouped(rows, context.n_ubatch):
        found += _continued(context, group.rows, max_new_tokens, frozenset(stops))
    return found


def _continued(context: Context, rows: Sequence[Row], max_new_tokens: int, stops: frozenset[int]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in rows]
    logits, going = context.begin(rows, max_new_tokens), list(range(len(rows)))
    for place in range(max_new_tokens):
        for sequence, token in zip(going, logits.argmax(axis=1).tolist(), strict=True):
            answers[sequence].append(token)
        going = [sequence for sequence in going if answers[sequence][-1] not in stops]
        if not going or place + 1 == max_new_tokens:
            break
        positions = [len(rows[sequence].ids) + place for sequence in going]
        logits = context.extend([answers[sequence][-1] for sequence in going], positions, going)
    return answers
