"""Search by feedback: a language model reads scores and the worst examples, and proposes template, label words and an instruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import digits
from typing import Any

import numpy as np

from zotune.io.text import metric_text, shortened, shown
from zotune.prompting.candidate import Candidate, options_of
from zotune.prompting.llm import reply
from zotune.prompting.scoring import Scores
from zotune.prompting.search_log import SearchLog
from zotune.prompting.trace_library import trace_library
from zotune.prompting.workplace import Workplace
from zotune.tasks.task import MASK

#: Examples in a feedback, and characters of each.
WORST, LONGEST_EXAMPLE = 4, 300
#: What the language model answers when it has no further suggestion (trace-opt's word).
END = "TERMINATE"
OBJECTIVE = (
    "Change the values of the variables in #Variables to raise the {metric} that evaluate reports, in accordance to #Feedback. The prompt "
    "of a row is instruction, a line break (if the instruction is not empty) and template, with {{column}} replaced by the row's text. A "
    "language model continues it, and the label word that it finds most likely is its answer."
)


@dataclass(frozen=True)
class Proposal:
    """Values of the variables; ``words``: class name -> label word."""

    instruction: str
    template: str
    words: Mapping[str, str]

    def candidate(self, place: Workplace) -> Candidate:
        """The prompt and options; braces of the instruction are literal."""
        lead = self.instruction.strip().replace("{", "{{").replace("}", "}}")
        prompt = f"{lead}\n{self.template}" if lead else self.template
        words = [self.words[name] for name in place.task.label_names]
        return Candidate(prompt, options_of(words, prompt, place.task, masked=place.scorer.masked))


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal on the rows to search on: its scores and the worst examples as text, or why it is invalid."""

    loss: float | None
    value: float | None
    text: str


class AdvisedSearch:
    """Rounds of OptoPrime over the variables ``instruction``, ``template`` and ``label_words``.

    Args:
        place: task, rows and scorer.
        llm: callable with ``messages=`` and ``number=``, whose reply is at ``.choices[0].message.content``.
        rounds: replies, at most.

    Raises:
        ModuleNotFoundError: trace-opt is not installed. ValueError: a task whose options are texts of each row.
    """

    def __init__(self, place: Workplace, llm: Callable[..., Any], rounds: int):
        if not place.task.fixed_options:
            raise ValueError(f"the options of task {place.task.name!r} are texts of each row, so --llm has no label words to change.")
        self.place, self.llm, self.rounds, self.library = place, llm, rounds, trace_library()
        self.metric = place.task.metrics[0]
        words = {name: text.strip(" ") for name, text in zip(place.task.label_names, place.start.options, strict=True)}
        self.start, self.best = Proposal("", place.start.prompt, words), place.start
        self.found: dict[Candidate, tuple[float, float]] = {}
        self.best_proposal, self.replies = self.start, 0

    def facts(self) -> dict[str, Any]:
        """Number of different valid candidates, and of replies."""
        return {"candidates": len(self.found), "replies": self.replies}

    def finalists(self, log: SearchLog, say: Callable[[str], None]) -> list[Candidate]:
        """The best candidates on the rows to search on; replies and scores on file are read."""
        place = self.place
        say(f"{self.rounds} rounds of a language model's advice; {len(place.search)} rows to search on, {len(place.held_out)} held out")
        model = _Recorded(self.llm, log)
        outcomes = {each["proposal"]: each for each in log.of_kind("scored")}
        optimizer, evaluate, parameters = self._optimizer(model, log, outcomes)
        for number in range(self.rounds + 1):
            result = evaluate(*parameters)
            outcome, proposal = self.outcome, self.proposal
            score = "invalid" if outcome.loss is None else self._score(outcome.loss, outcome.value)
            say(f"round {number} of {self.rounds}: {score}; {shown(proposal.template)}")
            if number == self.rounds:
                break
            optimizer.zero_feedback()
            optimizer.backward(result, self._feedback(outcome, optimizer.faults))
            optimizer.step()
            self.replies = number + 1
            if END in model.last:
                say(f"round {number + 1} of {self.rounds}: the language model has no further suggestion")
                break
        ranked = sorted(self.found, key=lambda each: self.found[each])
        return ranked[: place.args.keep]

    def _optimizer(self, model: _Recorded, log: SearchLog, outcomes: dict[str, dict[str, Any]]) -> tuple[Any, Any, list[Any]]:
        columns = ", ".join(f"{{{name}}}" for name in (*self.place.task.columns, *self.place.task.derived))
        names = list(self.place.task.label_names)
        mask = f", and with {MASK} once, where the label word stands" if self.place.scorer.masked else ""
        constraints = {
            "instruction": "A text, which may be empty.",
            "template": f"A text with at least one of the columns {columns}, and with no others{mask}; {{{{ and }}}} are literal braces.",
            "label_words": f"A JSON object with exactly the keys {names}; each value is a different short text.",
        }
        values = (self.start.instruction, self.start.template, dict(self.start.words))
        node = self.library.node
        parameters = [
            node(value, name=name, trainable=True, constraint=constraint)
            for value, (name, constraint) in zip(values, constraints.items(), strict=True)
        ]

        def evaluate(instruction: Any, template: Any, label_words: Any) -> str:
            """The score of a prompt on rows of the task."""
            self.proposal = Proposal(instruction, template, label_words)
            self.outcome = self._evaluated(self.proposal, log, outcomes)
            return "invalid" if self.outcome.loss is None else self._score(self.outcome.loss, self.outcome.value)

        description = (
            f"[evaluate] {self.metric} and mean cross-entropy of the prompts and label words on rows of a task: {self.place.task.title}."
        )
        traced = self.library.traced(evaluate, description)
        optimizer = _proposer(self.library.OptoPrime, names)(
            parameters, llm=model, objective=OBJECTIVE.format(metric=self.metric), log=False, max_tokens=None
        )
        return optimizer, traced, parameters

    def _evaluated(self, proposal: Proposal, log: SearchLog, outcomes: dict[str, dict[str, Any]]) -> Outcome:
        key = repr((proposal.instruction, proposal.template, sorted(proposal.words.items())))
        if key not in outcomes:
            outcome, candidate = self._scored(proposal)
            options = None if candidate is None else list(candidate.options)
            prompt = None if candidate is None else candidate.prompt
            event = {"proposal": key, "prompt": prompt, "options": options, "loss": outcome.loss, "value": outcome.value}
            outcomes[key] = {**event, "text": outcome.text, "sequences": self.place.sequences}
            log.add({"event": "scored", **outcomes[key]})
        found = outcomes[key]
        self.place.count_at_least(found["sequences"])
        if found["loss"] is not None:
            candidate = Candidate(found["prompt"], tuple(found["options"]))
            if not self.found or (-found["value"], found["loss"]) < min(self.found.values()):
                self.best, self.best_proposal = candidate, proposal
            self.found[candidate] = (-found["value"], found["loss"])
        return Outcome(found["loss"], found["value"], found["text"])

    def _scored(self, proposal: Proposal) -> tuple[Outcome, Candidate | None]:
        try:
            candidate = proposal.candidate(self.place)
            scores = self.place.scores(candidate, self.place.search)
        except ValueError as error:
            return Outcome(None, None, f"The variables are invalid: {error}"), None
        return Outcome(scores.loss, scores.value, self._worst(candidate, scores)), candidate

    def _worst(self, candidate: Candidate, scores: Scores) -> str:
        """The rows of the largest losses as text."""
        place, names = self.place, self.place.task.label_names
        task = place.as_task(candidate)
        lines = []
        for row in np.argsort(-scores.losses, kind="stable")[:WORST]:
            prompt = shortened(task.render(place.search[int(row)])[0], LONGEST_EXAMPLE)
            chosen, right = int(scores.predicted[row]), int(scores.answers[row])
            lines.append(
                f"{shown(prompt, LONGEST_EXAMPLE + 20)}: answered {names[chosen] if chosen >= 0 else None}, right is {names[right]}"
            )
        return "The worst examples:\n" + "\n".join(lines)

    def _feedback(self, outcome: Outcome, faults: list[str]) -> str:
        parts = [f"Your last answer was not used in full: {fault}" for fault in faults]
        if outcome.loss is not None:
            parts.append(f"The score is {self._score(outcome.loss, outcome.value)}.")
        parts.append(outcome.text)
        if self.found:
            value, loss = min(self.found.values())
            best = self.best_proposal
            parts.append(
                f"The best so far is {self._score(loss, -value)}, of instruction={best.instruction!r}, template={best.template!r}, "
                f"label_words={dict(best.words)!r}."
            )
        return "\n".join(parts)

    def _score(self, loss: float, value: float | None) -> str:
        return f"{self.metric} {metric_text(self.metric, value)}, loss {loss:.4f}"


class _Recorded:
    """A language model whose replies are logged; those on file come first."""

    def __init__(self, llm: Callable[..., Any], log: SearchLog):
        self.llm, self.log, self.last, self.number = llm, log, "", 0
        self.known = [each["reply"] for each in log.of_kind("reply")]

    def __call__(self, messages: Any, **others: Any) -> Any:
        if self.number < len(self.known):
            self.last = self.known[self.number]
        else:
            content = self.llm(messages=messages, number=self.number).choices[0].message.content
            self.last = content if isinstance(content, str) else ""
            self.log.add({"event": "reply", "round": self.number + 1, "reply": self.last})
        self.number += 1
        return reply(self.last)


def _proposer(base: Any, names: list[str]) -> Any:
    """OptoPrime that takes values of the right type only, and says in ``faults`` which it did not take, and why."""

    class Proposer(base):  # type: ignore[misc]
        faults: list[str] = []  # noqa: RUF012  replaced, never changed

        def construct_update_dict(self, suggestion: dict[str, Any]) -> dict[Any, Any]:
            """Values of the parameters that were suggested and have the right type."""
            by_name = {parameter.py_name.rstrip(digits): parameter for parameter in self.parameters}  # numbered within a process
            given = {str(name).rstrip(digits): value for name, value in suggestion.items()}
            self.faults = [] if given else ['it holds no JSON object with a "suggestion".']
            self.faults += [f"there is no variable {shown(name)}." for name in given if name not in by_name]
            accepted = {}
            for name, parameter in by_name.items():
                if name not in given:
                    continue
                fault = _fault(given[name], parameter.data, names)
                if fault is None:
                    accepted[parameter] = given[name]
                else:
                    self.faults.append(f"{name} {fault}")
            return accepted

    return Proposer


def _fault(value: Any, old: Any, names: list[str]) -> str | None:
    """Why a value cannot replace the old one of a variable; None where it can."""
    if isinstance(old, str):
        return None if isinstance(value, str) else f"must be a text, not {shown(value)}."
    if not isinstance(value, dict) or not all(isinstance(word, str) and word.strip() for word in value.values()):
        return f"must be a JSON object from class name to a label word, not {shown(value)}."
    return None if set(value) == set(names) else f"must have exactly the keys {names}, not {shown(list(value))}."
