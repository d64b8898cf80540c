"""Successive halving over templates (1502.07943): many templates on few rows, the better half of them on twice as many, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zotune.io.text import metric_text
from zotune.prompting.candidate import Candidate, options_of
from zotune.prompting.scoring import Scorer, Scores, fit_words
from zotune.prompting.search_log import SearchLog
from zotune.prompting.space import Space, distinct, space_of
from zotune.prompting.workplace import Workplace
from zotune.tasks import Rows, Task


@dataclass(frozen=True)
class Ranked:
    """A candidate, its template's index, and its scores on the rows of a round."""

    template: int
    candidate: Candidate
    loss: float
    value: float


def rows_of_rounds(rows: int, rounds: int) -> list[int]:
    """Rows of each round: all in the last one, half as many in the one before.

    Example:
        >>> rows_of_rounds(256, 4)
        [32, 64, 128, 256]
    """
    return [-(-rows // 2 ** (rounds - 1 - number)) for number in range(rounds)]


class Halving:
    """The search over a space.

    Args:
        scorer: scores options on rows.
        task: whose prompts are searched.
        space: templates and usable label words.
        rows: to search on, in random order; a round takes the first of them.
        rounds: number of rounds.
        keep: templates that are left at the end, and at least in each round.

    The label words of a template are chosen from one forward with those of all classes (:func:`zotune.prompting.scoring.fit_words`).
    """

    def __init__(self, scorer: Scorer, task: Task, space: Space, rows: Rows, *, rounds: int, keep: int):
        self.scorer, self.task, self.space, self.rows, self.keep = scorer, task, space, rows, keep
        self.sizes = rows_of_rounds(len(rows), rounds)
        self.words = distinct(space.words)
        self.columns = [[self.words.index(word) for word in group] for group in space.words]
        self._scores: dict[int, Scores] = {}
        self._seen: dict[int, int] = {}

    def templates_after(self, count: int, number: int) -> int:
        """How many of ``count`` templates of round ``number`` go on."""
        return min(count, self.keep if number == len(self.sizes) - 1 else max(self.keep, -(-count // 2)))

    def round(self, number: int, templates: Sequence[int]) -> list[Ranked]:
        """The best of these templates on the rows of a round, the best first."""
        ranked = [self._ranked(template, self._all_scores(template, self.sizes[number])) for template in templates]
        ranked.sort(key=lambda each: each.loss)  # of equals the first one
        kept = ranked[: self.templates_after(len(templates), number)]
        self._scores = {each.template: self._scores[each.template] for each in kept}
        return kept

    def _all_scores(self, template: int, count: int) -> Scores:
        """Scores of all label words behind a template on the first ``count`` rows; only new rows are evaluated."""
        begin = self._seen.get(template, 0) if template in self._scores else 0
        if begin < count:
            prompt = self.space.templates[template]
            options = options_of(self.words, prompt, self.task, masked=self.scorer.masked)
            more = self.scorer.score(replace(self.task, prompt=prompt), self.rows.select(range(begin, count)), options)
            self._scores[template] = self._scores[template].and_those(more) if begin else more
            self._seen[template] = count
        return self._scores[template]

    def _ranked(self, template: int, scores: Scores) -> Ranked:
        columns = fit_words(scores, self.columns)
        assert columns is not None, "the words of the classes were checked"
        prompt, chosen = self.space.templates[template], scores.chosen(columns)
        options = options_of([self.words[column] for column in columns], prompt, self.task, masked=self.scorer.masked)
        return Ranked(template, Candidate(prompt, options), chosen.loss, chosen.value)


class HalvingSearch:
    """Successive halving over the templates and label words of a file, or the built-in variations of the task's own.

    Args:
        place: task, rows and scorer.
        rounds: number of rounds.

    Raises:
        ValueError: an invalid file, or classes that cannot have different label words.
    """

    def __init__(self, place: Workplace, rounds: int):
        args, scorer = place.args, place.scorer
        space = space_of(args.task or "", place.task, args.templates, masked=scorer.masked)
        words = scorer.usable(space.words, place.task, short=space.built_in_words)
        self.place, self.space, self.best = place, replace(space, words=words), place.start
        self.halving = Halving(scorer, place.task, self.space, place.search, rounds=rounds, keep=args.keep)
        if fit_words(Scores(np.zeros((1, len(self.halving.words))), np.zeros(1, dtype=int)), self.halving.columns) is None:
            names = ", ".join(place.task.label_names)
            raise ValueError(f"the classes {names} cannot have different label words: list more of them under words.")

    def facts(self) -> dict[str, Any]:
        """Number of candidates, of templates, and of sequences without halving."""
        templates = len(self.space.templates)
        return {"candidates": self.space.size, "templates": templates, "every_template_on_every_row": templates * len(self.place.search)}

    def finalists(self, log: SearchLog, say: Callable[[str], None]) -> list[Candidate]:
        """The candidates of the last round, the best first; rounds on file are read."""
        place, metric, sizes = self.place, self.place.task.metrics[0], self.halving.sizes
        words = " × ".join(str(len(group)) for group in self.space.words)
        rows = f"{len(place.search)} rows to search on, {len(place.held_out)} held out"
        say(f"{len(self.space.templates)} templates, {words} label words; {rows}")
        templates, ranked = list(range(len(self.space.templates))), list[Ranked]()
        done = log.of_kind("round")
        for number, size in enumerate(sizes):
            line = None
            if number < len(done):
                ranked = [_restored(each) for each in done[number]["kept"]]
                place.count_at_least(done[number]["sequences"])
            else:
                ranked = self.halving.round(number, templates)
                kept = [_entry(each) for each in ranked]
                log.add({"event": "round", "round": number + 1, "rows": size, "sequences": place.sequences, "kept": kept})
                best = f"loss {ranked[0].loss:.4f}, {metric} {metric_text(metric, ranked[0].value)}, {ranked[0].candidate.prompt!r}"
                line = f"round {number + 1} of {len(sizes)}: {len(templates)} templates on {size} rows; best: {best}"
            templates, self.best = [each.template for each in ranked], ranked[0].candidate
            if line is not None:
                say(line)
        return [each.candidate for each in ranked]


def _entry(ranked: Ranked) -> dict[str, Any]:
    candidate = ranked.candidate
    options = list(candidate.options)
    return {"template": ranked.template, "prompt": candidate.prompt, "options": options, "loss": ranked.loss, "value": ranked.value}


def _restored(entry: dict[str, Any]) -> Ranked:
    return Ranked(entry["template"], Candidate(entry["prompt"], tuple(entry["options"])), entry["loss"], entry["value"])
