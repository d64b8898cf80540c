"""Rows packed into blocks as TRL's `packing_strategy="wrapped"` packs them: one behind the other, cut at every block's end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def check(strategy: str, length: int | None, evaluated: bool = False) -> None:
    """ValueError where a packing of TRL's is not possible here, with the fix.

    Args:
        strategy: TRL's `packing_strategy`.
        length: tokens of a block.
        evaluated: whether rows to evaluate are packed.
    """
    name = "eval_packing" if evaluated else "packing"
    if strategy != "wrapped":
        raise ValueError(
            f"packing_strategy={strategy!r} of the SFTConfig keeps rows apart within a block by their position ids, which saves padding "
            f"and changes no loss: leave {name} out, and rows are padded; or set packing_strategy='wrapped'."
        )
    if length is None:
        raise ValueError(f"{name}=True of the SFTConfig needs the tokens of a block: set max_length.")


def blocks(rows: Sequence[tuple[list[int], list[bool]]], length: int, source: str) -> list[dict[str, Any]]:
    """Examples of ``length`` tokens of (ids, whether each is scored); the last one may be shorter.

    A block's first token is predicted by nothing. Blocks without a scored token, which change no mean over tokens, are left out.

    Raises:
        ValueError: no block has a scored token.
    """
    ids = [token for row, _ in rows for token in row]
    scored = [mark for _, row in rows for mark in row]
    cut = [scored_example(ids[at : at + length], scored[at : at + length]) for at in range(0, len(ids), length)]
    found = [example for example in cut if example is not None]
    if not found:
        raise ValueError(f"{source} has no token to score in blocks of {length} tokens.")
    if len(found) < len(cut):
        logger.warning("%s: %d of %d blocks have no token to score and are left out.", source, len(cut) - len(found), len(cut))
    return found


def scored_example(ids: list[int], scored: list[bool]) -> dict[str, Any] | None:
    """An example of ids and whether each is scored, its prompt all up to the first that is; None where none is but the first token."""
    start = max(1, scored.index(True) if True in scored else len(ids))  # nothing predicts the first token
    mask = scored[start:]
    if not any(mask):
        return None
    example: dict[str, Any] = {"prompt_ids": ids[:start], "completion_ids": ids[start:]}
    return example if all(mask) else {**example, "completion_mask": mask}
