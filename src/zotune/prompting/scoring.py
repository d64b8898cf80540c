"""Scores of options on rows, by the code that evaluates a model: :class:`Scorer`; label words chosen from them: :func:`fit_words`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zotune.tasks import Encoder, Rows, Task, pad_token_id
from zotune.tasks.collators import ChoicesCollator, MaskedCollator
from zotune.tasks.masked import encode_masked
from zotune.tasks.metrics import METRICS, predictions
from zotune.tasks.vocabulary import check_vocabulary
from zotune.training.config import ZOConfig
from zotune.training.trainer import ZOTrainer

#: Rounds of :func:`fit_words` over all classes, at most.
MOST_SWEEPS = 20


@dataclass(frozen=True)
class Scores:
    """Scores on rows.

    Attributes:
        options: log-probability of each option, (N, C), normalized over the options.
        answers: index of the right one, (N,).
        metric: name of the task's main metric.
    """

    options: np.ndarray
    answers: np.ndarray
    metric: str = "accuracy"

    @property
    def losses(self) -> np.ndarray:
        """Cross-entropy of each row, (N,), in nats."""
        return -self.options[np.arange(len(self.answers)), self.answers]

    @property
    def loss(self) -> float:
        """Mean of the losses; infinite where one is not a number."""
        value = float(np.mean(self.losses))
        return value if np.isfinite(value) else float("inf")

    @property
    def value(self) -> float:
        """The main metric."""
        return float(METRICS[self.metric](predictions(self.options), self.answers))

    @property
    def predicted(self) -> np.ndarray:
        """Index of the best option of each row, (N,)."""
        return predictions(self.options)

    def chosen(self, columns: Sequence[int]) -> Scores:
        """Scores where these options are all that there are."""
        return replace(self, options=log_softmax(self.options[:, list(columns)]))

    def and_those(self, more: Scores) -> Scores:
        """With the rows of ``more`` behind these."""
        return replace(self, options=np.concatenate([self.options, more.options]), answers=np.concatenate([self.answers, more.answers]))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """log softmax over the last dimension."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Scorer:
    """Scores options of a task on rows.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        config: its configuration.
        encoder: rows to token ids.
        training: batch size and device.
        masked: whether it is a masked language model.
        engine: the engine whose tokenizer has to read texts as ``tokenizer`` does, or None.

    Attributes:
        sequences: rows scored so far, each with all its options.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Any, encoder: Encoder, training: ZOConfig, *, masked: bool, engine: Any = None):
        self.tokenizer, self.config, self.encoder, self.masked, self.engine = tokenizer, config, encoder, masked, engine
        self.objective = "mlm" if masked else "choices"
        self.padding = pad_token_id(tokenizer)
        collate = self._collator(False)
        self.trainer = ZOTrainer(model=model, args=training, objective=self.objective, eval_objective=self.objective, data_collator=collate)
        self.sequences = 0

    def _collator(self, length_normalize: bool) -> Any:
        return MaskedCollator(self.padding) if self.masked else ChoicesCollator(self.padding, length_normalize=length_normalize)

    def score(self, task: Task, rows: Rows, options: Sequence[str] | None = None) -> Scores:
        """Scores of the task's options on rows, or of other ``options``, as many as one likes.

        Raises:
            ValueError: a row cannot be encoded, or is longer than the model's context.
        """
        if options is not None:
            task = replace(task, options=tuple(options))
        self.encoder.texts.clear()
        examples = encode_masked(self.encoder, rows, task) if self.masked else self.encoder.choices(rows, task)
        check_vocabulary(self.tokenizer, self.config, self.padding, examples)
        if self.engine is not None:
            from zotune.tasks.tokenizer_check import check_tokenizer

            check_tokenizer(self.tokenizer, self.engine, self.encoder.texts)
        with self.trainer.evaluating(self.objective, self._collator(task.length_normalize), None):
            loader = self.trainer.get_eval_dataloader(examples)
            found = self.trainer.evaluation_loop(loader, "evaluation", prediction_loss_only=False)
        self.sequences += len(examples)
        answers = np.asarray([example["answer"] for example in examples])
        return Scores(np.asarray(found.predictions, dtype=np.float64), answers, task.metrics[0])

    def usable(self, words: Sequence[Sequence[str]], task: Task, *, short: bool) -> tuple[tuple[str, ...], ...]:
        """For each class the words that this tokenizer can tell apart; for a mask those that are one token.

        Args:
            words: of each class.
            task: whose classes they are of.
            short: keep only those with the fewest tokens of their class, which are scored fastest.

        Raises:
            ValueError: a class has none.
        """
        if not task.fixed_options:
            return tuple(map(tuple, words))
        known: dict[tuple[int, ...], str] = {}
        groups = []
        for name, group in zip(task.label_names, words, strict=True):
            by_ids: dict[tuple[int, ...], str] = {}
            for word in group:
                ids = tuple(self.encoder.ids(f" {word}"))
                if not self.masked or (len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id):
                    by_ids.setdefault(ids, known.setdefault(ids, word))
            if not by_ids:
                raise ValueError(
                    f"no label word of the class {name!r} is one token of this tokenizer, and a mask stands for one: list other words."
                )
            fewest = min(map(len, by_ids))
            groups.append(tuple(word for ids, word in by_ids.items() if not short or len(ids) == fewest))
        return tuple(groups)


def fit_words(scores: Scores, groups: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """One option for each class, of the least mean cross-entropy where no single exchange lessens it (coordinate descent).

    Args:
        scores: of the options of all classes.
        groups: for each class the columns of its options in ``scores``.

    Returns:
        The column of each class; None where the classes cannot have different ones.
    """
    chosen = _distinct_start(groups)
    if chosen is None:
        return None
    best = scores.chosen(chosen).loss
    for _ in range(MOST_SWEEPS):
        changed = False
        for place, group in enumerate(groups):
            for column in group:
                if column in chosen:
                    continue
                trial = [*chosen[:place], column, *chosen[place + 1 :]]
                loss = scores.chosen(trial).loss
                if loss < best:
                    best, chosen, changed = loss, trial, True
        if not changed:
            break
    return tuple(chosen)


def _distinct_start(groups: Sequence[Sequence[int]]) -> list[int] | None:
    """A column of each class, all different, the first ones where possible (a bipartite matching)."""
    owner: dict[int, int] = {}

    def place(index: int, tried: set[int]) -> bool:
        for column in groups[index]:
            if column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = index
                    return True
        return False

    if not all(place(index, set()) for index in range(len(groups))):
        return None
    return [next(column for column, index in owner.items() if index == wanted) for wanted in range(len(groups))]
