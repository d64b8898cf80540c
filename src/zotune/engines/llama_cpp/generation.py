"""Generation: the completions of a group of prompts as sequences of one context, a token each at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zotune.engines.engine import Choose, Row
from zotune.engines.llama_cpp.context import MAX_SEQUENCES, Context, grouped


def likeliest(logits: np.ndarray, _rows: list[int], _place: int) -> np.ndarray:
    """The greedy choice."""
    return logits.argmax(axis=1)


def completions(
    context: Context, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[int], choose: Choose, num_samples: int
) -> list[list[int]]:
    """As :meth:`zotune.engines.engine.Engine.generate`: a prompt is evaluated once for all of its completions.

    Raises:
        ValueError: a prompt is empty, or leaves no room in the context.
    """
    rows = []
    for prompt in prompts:
        if not 0 < len(prompt) <= context.longest - max_new_tokens + 1:  # the last token is no input
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, and with {max_new_tokens} new ones the context takes {context.longest}: cut prompts "
                "with --max_length, or raise --n_ctx where the model was trained for more."
            )
        ids, last = np.array(prompt, np.int32), np.array([len(prompt) - 1])
        most = min(MAX_SEQUENCES, max(1, (context.most_cached - len(prompt)) // max(1, max_new_tokens)))
        for first in range(0, num_samples, most):
            samples = min(most, num_samples - first)
            rows.append(Row(ids, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32), last, samples))
    found: list[list[int]] = []
    for group in grouped(rows, context.most_cached, max_new_tokens):
        found += _continued(context, group.rows, max_new_tokens, frozenset(stops), choose, len(found))
    return found


def _continued(
    context: Context, rows: Sequence[Row], max_new_tokens: int, stops: frozenset[int], choose: Choose, first: int
) -> list[list[int]]:
    """Completions of one group of prompts; ``first`` is the number of the first one among those of all groups."""
    lengths = [len(row.ids) for row in rows for _ in range(row.samples)]
    answers: list[list[int]] = [[] for _ in lengths]
    logits, going = context.begin(rows, max_new_tokens), list(range(len(lengths)))
    logits = logits.repeat([row.samples for row in rows], axis=0)
    for place in range(max_new_tokens):
        chosen = choose(logits, [first + sequence for sequence in going], place)
        for sequence, token in zip(going, chosen.tolist(), strict=True):
            answers[sequence].append(token)
        going = [sequence for sequence in going if answers[sequence][-1] not in stops]
        if not going or place + 1 == max_new_tokens:
            break
        positions = [lengths[sequence] + place for sequence in going]
        logits = context.extend([answers[sequence][-1] for sequence in going], positions, going)
    return answers
