"""Successive halving over templates (1502.07943): many templates on few rows, the better half of them on twice as many, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zotune.prompting.candidate import Candidate, options_of
from zotune.prompting.scoring import Scorer, Scores, fit_words
from zotune.prompting.space import Space, distinct
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

    def round(self, number: int, templates: Sequence[int], said: Callable[[int], None] | None = None) -> list[Ranked]:
        """The best of these templates on the rows of a round, the best first; ``said`` is called after each template."""
        ranked = []
        for done, template in enumerate(templates, 1):
            ranked.append(self._ranked(template, self._all_scores(template, self.sizes[number])))
            if said is not None:
                said(done)
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
