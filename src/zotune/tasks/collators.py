"""Encoded examples → batches of tensors, examples along dimension 0, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.objectives.losses import IGNORE

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Collator:
    """What all collators share.

    Attributes:
        pad_token_id: id of the padding, which is masked.
        pad_to_multiple_of: round T up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def _length(self, lengths: Iterable[int]) -> int:
        longest, multiple = max(lengths), self.pad_to_multiple_of
        return longest if not multiple else -(-longest // multiple) * multiple

    def _inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """input_ids and attention_mask of rows of ids, (rows, T)."""
        length = self._length(map(len, rows))
        return {
            "input_ids": padded(rows, length, self.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in rows], length, 0),
        }


@dataclass(frozen=True)
class LanguageModelCollator(Collator):
    """Batches for ``LanguageModelLoss``: input_ids (B, T), attention_mask (B, T), positions (B, S), targets (B, S).

    A choices example is its prompt and the right option. The last token is predicted but no input, so T is one less than the longest text.

    Attributes:
        over_tokens: add weights (B,), each example's scored tokens over their mean, so that the mean loss is that of the batch's tokens.
    """

    over_tokens: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        inputs, positions, targets = [], [], []
        for example in examples:
            completion = example["option_ids"][example["answer"]] if "option_ids" in example else example["completion_ids"]
            ids, where, what = _scored(example["prompt_ids"], completion, example.get("completion_mask"))
            inputs.append(ids)
            positions.append(where)
            targets.append(what)
        scored = max(map(len, positions))
        batch = {**self._inputs(inputs), "positions": padded(positions, scored, 0), "targets": padded(targets, scored, IGNORE)}
        if self.over_tokens:
            tokens = torch.tensor([float(len(each)) for each in targets])
            batch["weights"] = tokens / tokens.mean().clamp(min=1e-9)
        return batch


@dataclass(frozen=True)
class ChoicesCollator(Collator):
    """Batches for ``choice_scores`` and ``ChoiceLoss``, in one of three forms, each with answer (B,).

    - All options single tokens, equally many per example: input_ids (B, T), attention_mask (B, T), positions (B, 1), option_ids (B, C).
    - One row per example, the prompt once and all options after it, where that is less work than the next form: the inputs of
      :func:`zotune.objectives.packed_choices.option_logprobs`, and option_mask (B, C).
    - One row per option: input_ids (B, C, T), attention_mask (B, C, T), positions (B, C, S), targets (B, C, S), option_mask (B, C).

    Examples with several right options add right (B, C), 1 for those.

    Attributes:
        single_token_form: allow the first form.
        shared_prompt: allow the second.
        length_normalize: add option_lengths (B, C), the scored tokens of each option, by which its score is divided.
    """

    single_token_form: bool = True
    shared_prompt: bool = True
    length_normalize: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        counts = {len(example["option_ids"]) for example in examples}
        single = all(len(option) == 1 for example in examples for option in example["option_ids"])
        batch = self._single_tokens(examples) if self.single_token_form and single and len(counts) == 1 else None
        if batch is None and self._packing_pays(examples, max(counts)):
            batch = self._packed(examples, max(counts))
        batch = batch or self._row_per_option(examples, max(counts))
        batch["answer"] = torch.tensor([example["answer"] for example in examples])
        if self.length_normalize and "targets" in batch:  # else every option is one token
            batch["option_lengths"] = (batch["targets"] != IGNORE).sum(dim=2).clamp(min=1)
        if "right" in examples[0]:
            columns = range(max(counts))
            batch["right"] = torch.tensor([[int(column in example["right"]) for column in columns] for example in examples])
        return batch

    def _single_tokens(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        return {
            **self._inputs(prompts),
            "positions": torch.tensor([[len(ids) - 1] for ids in prompts]),
            "option_ids": torch.tensor([[option[0] for option in example["option_ids"]] for example in examples]),
        }

    def _packing_pays(self, examples: Sequence[Example], most: int) -> bool:
        if not self.shared_prompt or not all(example["prompt_ids"] and all(example["option_ids"]) for example in examples):
            return False  # without a prompt an option's first token is not scored
        fed = [[len(option) - 1 for option in example["option_ids"]] for example in examples]
        prompts = [len(example["prompt_ids"]) for example in examples]
        together = self._length(prompt + sum(options) for prompt, options in zip(prompts, fed, strict=True))
        apart = self._length(prompt + max(options) for prompt, options in zip(prompts, fed, strict=True))
        return _work(together) < most * _work(apart)

    def _packed(self, examples: Sequence[Example], most: int) -> dict[str, Tensor]:
        inputs, position_ids, segments, positions, places, targets, own_rows, present = [], [], [], [], [], [], [], []
        for example in examples:
            prompt, options = example["prompt_ids"], example["option_ids"]
            start = len(prompt)
            ids, where, whose, scored = [*prompt], [*range(start)], [0] * start, [start - 1]
            for number, option in enumerate(options, 1):
                fed = len(option) - 1  # the last token is predicted but no input
                places.append([0, *range(len(scored), len(scored) + fed)])
                scored += range(len(ids), len(ids) + fed)
                own_rows.append([*range(start), *range(len(ids), len(ids) + fed)])
                targets.append(option)
                ids += option[:-1]
                where += range(start, start + fed)
                whose += [number] * fed
            missing = most - len(options)
            places += [[]] * missing
            targets += [[]] * missing
            own_rows += [[*range(start)]] * missing  # scores nothing, but no row is all padding
            present.append([True] * len(options) + [False] * missing)
            inputs.append(ids)
            position_ids.append(where)
            segments.append(whose)
            positions.append(scored)
        length, own_length = self._length(map(len, inputs)), self._length(map(len, own_rows))
        scored_tokens, shape = max(map(len, targets)), (len(examples), most, -1)
        return {
            "input_ids": padded(inputs, length, self.pad_token_id),
            "position_ids": padded(position_ids, length, 0),
            "segments": padded(segments, length, -1),
            "positions": padded(positions, max(map(len, positions)), 0),
            "places": padded(places, scored_tokens, 0).view(shape),
            "targets": padded(targets, scored_tokens, IGNORE).view(shape),
            "own_rows": padded(own_rows, own_length, -1).view(shape),
            "option_mask": torch.tensor(present),
        }

    def _row_per_option(self, examples: Sequence[Example], most: int) -> dict[str, Tensor]:
        inputs, positions, targets, present = [], [], [], []
        for example in examples:
            rows = [_scored(example["prompt_ids"], option) for option in example["option_ids"]]
            missing = most - len(rows)
            # A missing option repeats the first one's input, so that no row is all padding, and scores nothing.
            rows += [(rows[0][0], [], [])] * missing
            present.append([True] * (most - missing) + [False] * missing)
            for ids, where, what in rows:
                inputs.append(ids)
                positions.append(where)
                targets.append(what)
        scored = max(map(len, positions))
        shape = (len(examples), most, -1)
        return {
            **{name: tensor.view(shape) for name, tensor in self._inputs(inputs).items()},
            "positions": padded(positions, scored, 0).view(shape),
            "targets": padded(targets, scored, IGNORE).view(shape),
            "option_mask": torch.tensor(present),
        }


@dataclass(frozen=True)
class MaskedCollator(Collator):
    """Batches for ``MaskedLanguageModelLoss``: input_ids and attention_mask (B, T), positions (B, 1), option_ids (B, C), answer (B,)."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {
            **self._inputs([example["prompt_ids"] for example in examples]),
            "positions": torch.tensor([[example["mask_position"]] for example in examples]),
            "option_ids": torch.tensor([[word for (word,) in example["option_ids"]] for example in examples]),
            "answer": torch.tensor([example["answer"] for example in examples]),
        }


@dataclass(frozen=True)
class GenerationCollator(Collator):
    """Batches for ``LanguageModelLoss`` on the right answers and for :func:`zotune.training.evaluation.greedy`.

    To those of :class:`LanguageModelCollator` it adds prompt_ids (B, P) and prompt_mask (B, P), padded on the left, max_new_tokens (B,),
    stop_ids (B, E), pad_id (B,) and reference (B,), each example's index among the texts of the right answers.

    Attributes:
        max_new_tokens: longest answer.
        stop_ids: tokens that end one.
    """

    max_new_tokens: int = 50
    stop_ids: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = LanguageModelCollator(self.pad_token_id, self.pad_to_multiple_of)(examples)
        prompts, size = [example["prompt_ids"] for example in examples], len(examples)
        length = max(map(len, prompts))
        batch["prompt_ids"] = torch.tensor([[self.pad_token_id] * (length - len(ids)) + list(ids) for ids in prompts])
        batch["prompt_mask"] = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
        batch["max_new_tokens"] = torch.full((size,), self.max_new_tokens)
        batch["stop_ids"] = torch.tensor([self.stop_ids] * size, dtype=torch.long)
        batch["pad_id"] = torch.full((size,), self.pad_token_id)
        batch["reference"] = torch.tensor([example["reference"] for example in examples])
        return batch


@dataclass(frozen=True)
class ClassifierCollator(Collator):
    """Batches for ``ClassifierLoss``: input_ids (B, T), attention_mask, token_type_ids where given, labels (B,)."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        inputs = [example["input_ids"] for example in examples]
        batch = self._inputs(inputs)
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = padded([example["token_type_ids"] for example in examples], batch["input_ids"].shape[1], 0)
        batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch


def _work(length: int) -> float:
    """Cost of a row, in tokens; attention costs as much as the matrices at length 4096, for a width near 700."""
    return length * (1 + length / 4096)


def _scored(prompt: Sequence[int], completion: Sequence[int], mask: Sequence[bool] | None = None) -> tuple[list[int], list[int], list[int]]:
    """Input ids, positions and targets of a completion; its first token needs a token before it to be scored."""
    ids = [*prompt, *completion]
    scored = [len(prompt) + index for index in range(len(completion)) if (mask is None or mask[index]) and len(prompt) + index > 0]
    return ids[:-1], [index - 1 for index in scored], [ids[index] for index in scored]


def padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    """Rows of ids as a tensor (rows, length), filled up with a value."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)
