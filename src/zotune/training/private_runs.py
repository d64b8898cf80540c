"""What a trainer needs of a private run: its key, a batch that is not private, steps without a data loader's order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from zotune.optim.journal import Journal
from zotune.optim.privacy import Privacy
from zotune.rng.secret import KEY_BYTES
from zotune.tasks.collators import Collator
from zotune.training.config import ZOConfig
from zotune.training.run_folder import PRIVATE_KEY

#: Tokens of a text that is made up.
TOKENS = 8


def write_key(folder: Path, key: bytes) -> None:
    """Writes a run's key, readable by its owner alone.

    The name of its folder begins with an underscore: `push_to_hub` of transformers leaves such folders out.
    """
    path = folder / PRIVATE_KEY
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_key(folder: Path) -> bytes:
    """The key of the run in a folder.

    Raises:
        ValueError: it is not there, or damaged.
    """
    path = folder / PRIVATE_KEY
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii")[: 4 * KEY_BYTES])
    except FileNotFoundError:
        raise ValueError(
            f"there is no {path}, the key of this private run: without it the noise of the next steps is not known, so it cannot be "
            "resumed. Start a new run in another output_dir."
        ) from None
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} is damaged: it does not hold a key of {KEY_BYTES} bytes; restore it, or start a new run.")
    return key


def privacy_of(config: ZOConfig, examples: int, batch_size: int, steps: int, recorded: float | None, **rest: Any) -> Privacy:
    """The privacy of a run.

    Args:
        config: of the run.
        examples: in the training data.
        batch_size: of a step, on average.
        steps: of the run.
        recorded: the noise multiplier of a run that resumes.
        rest: key and public batch.

    Raises:
        ValueError: a value is out of range, or a resumed run would spend more than it may.
    """
    options: dict[str, Any] = {
        "clip": config.dp_clip,
        "examples": examples,
        "batch_size": batch_size,
        "delta": config.dp_delta,
        "neighbors": config.dp_neighbors,
    }
    noise = config.dp_noise_multiplier if recorded is None else recorded
    if noise is None:
        assert config.dp_epsilon is not None
        return Privacy.for_epsilon(config.dp_epsilon, steps, **options, **rest)
    found = Privacy(noise_multiplier=noise, **options, **rest)
    spent = found.epsilon(steps)
    if config.dp_epsilon is not None and spent > config.dp_epsilon * (1 + 1e-6):
        raise ValueError(
            f"the noise of this run was made for fewer steps: {steps} of them would spend ε = {spent:.4g}, more than dp_epsilon = "
            f"{config.dp_epsilon:g}. Resume with the run's own max_steps, or start a new run."
        )
    return found


def recorded_noise(journal: Path) -> float:
    """The noise multiplier of the private run that wrote a journal.

    Raises:
        ValueError: the run was not private.
    """
    settings = Journal.open(journal).header.get("privacy")
    noise = settings.get("noise_multiplier") if isinstance(settings, dict) else None
    if not isinstance(noise, float):
        raise ValueError(
            f"the run of {journal} was not private, so a private one cannot continue it: start a new run in another output_dir."
        )
    return noise


class StepNumbers(Dataset):
    """In place of examples, the micro-batches of an epoch by number: the examples of a step are drawn when it is taken."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, int]:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return {"micro_batch": number}


def public_batch(
    dataset: Any, eval_dataset: Any, collator: Any, collate: Callable[[Sequence[Any]], Any], rows: int, vocabulary: int
) -> Any:
    """A batch in the form of the training batches that says nothing of them: of made-up tokens, or else of evaluation examples.

    Of the training data only the names of an example's entries are read.

    Args:
        dataset, eval_dataset: of a trainer.
        collator: its own; made-up examples are for those of zotune, which take texts of any length.
        collate: makes a batch of examples.
        rows: examples of the batch.
        vocabulary: number of tokens.

    Raises:
        ValueError: there is no way to such a batch.
    """
    first = dataset[0]
    names = list(first) if isinstance(first, Mapping) else []
    usable = hasattr(eval_dataset, "__getitem__") and not isinstance(eval_dataset, Mapping) and len(eval_dataset) > 1
    if isinstance(collator, Collator) or not usable:
        try:
            return collate([_made_up(names, number, vocabulary) for number in range(rows)])
        except Exception as error:  # whatever a collator does with rows that it did not expect
            if not usable:
                raise ValueError(
                    f"a private run checks the model on a batch that is not private, and none can be made up of {names} ({error}): give an "
                    "eval_dataset of public examples in the form of the training examples."
                ) from None
    return collate([eval_dataset[number % len(eval_dataset)] for number in range(rows)])


def _made_up(names: Sequence[str], number: int, vocabulary: int) -> dict[str, Any]:
    """An example of random tokens."""
    tokens = np.random.default_rng((number, 0)).integers(0, vocabulary, 3 * TOKENS).tolist()
    values: dict[str, Any] = {
        "prompt_ids": tokens[:TOKENS],
        "completion_ids": tokens[TOKENS : TOKENS + 2],
        "option_ids": [[tokens[-1]], [tokens[-2]]],
        "answer": number % 2,
        "right": [number % 2],
        "reference": 0,
        "mask_position": TOKENS // 2,
        "input_ids": tokens[:TOKENS],
        "labels": tokens[:TOKENS],
        "attention_mask": [1] * TOKENS,
        "token_type_ids": [0] * TOKENS,
        "label": 0,
    }
    unknown = [name for name in names if name not in values and name != "completion_mask"]
    if unknown or not names:
        raise ValueError(f"unknown entries {unknown}" if unknown else "examples without named entries")
    return {name: values[name] for name in names if name in values}
