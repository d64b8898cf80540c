"""One search as a function: :func:`search` loads model and rows, finds candidates, keeps the best by held-out rows, writes a file."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from zotune.io.json_files import write_json
from zotune.io.lock import locked
from zotune.io.text import metric_text
from zotune.prompting.advice import AdvisedSearch
from zotune.prompting.arguments import PromptArguments
from zotune.prompting.candidate import Candidate
from zotune.prompting.halving import HalvingSearch
from zotune.prompting.llm import LocalLLM, load_llm
from zotune.prompting.search_log import BEST_FILE, LOG_FILE, SUMMARY_FILE, SearchLog
from zotune.prompting.task_file import write_task
from zotune.prompting.workplace import Workplace, workplace
from zotune.training.arguments import ModelArguments

Say = Callable[[str], None]
#: Rounds of a search: of successive halving, and of a language model's replies.
HALVINGS, REPLIES = 4, 10


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        folder: with the task file, the log and the summary.
        best: the candidate that was kept.
        summary: content of `summary.json`.
    """

    folder: Path
    best: Candidate
    summary: dict[str, Any]


class Finder(Protocol):
    """Finds candidates on the rows to search on; ``best``: the best so far."""

    best: Candidate

    def finalists(self, log: SearchLog, say: Say) -> list[Candidate]:
        """The candidates that the held-out rows choose among, the best first."""

    def facts(self) -> dict[str, Any]:
        """Entries of the summary."""


def search(
    model: ModelArguments, args: PromptArguments, say: Say = lambda line: None, llm: Callable[..., Any] | None = None
) -> SearchResult:
    """Searches a prompt for a task.

    Args:
        model: which model reads the prompts; without a name that of ``args.llm``.
        args: task, rows and candidates.
        say: receives lines of progress.
        llm: proposes candidates in place of ``args.llm``: callable with ``messages=`` and ``number=`` (of the call), its reply at
            ``.choices[0].message.content``.

    Raises:
        ValueError, FileNotFoundError: an invalid request; nothing is written.
        KeyboardInterrupt: interrupted; the task file holds the best so far.
    """
    began, folder = time.perf_counter(), Path(args.output_dir or "").expanduser()
    if model.model_name_or_path is None and args.llm is not None:
        model = replace(model, model_name_or_path=args.llm)
    log = SearchLog(folder, settings_of(model, args))
    with tempfile.TemporaryDirectory(prefix="zotune-prompt-") as scratch:
        place = workplace(model, args, scratch)
        if llm is None and args.llm is not None:
            llm = _llm(model, args, place)
        rounds = args.rounds or (HALVINGS if llm is None else REPLIES)
        finder: Finder = HalvingSearch(place, rounds) if llm is None else AdvisedSearch(place, llm, rounds)
        with locked(folder):
            log = SearchLog(folder, log.settings)  # another process may have worked in the folder since
            return _Search(place, finder, log, folder, say).carry_out(began)


def _llm(model: ModelArguments, args: PromptArguments, place: Workplace) -> LocalLLM:
    """The language model of ``args.llm``; where the same model reads the prompts it is loaded once."""
    how: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    scorer = place.scorer
    if args.llm == model.model_name_or_path:
        return LocalLLM(scorer.trainer.model, scorer.tokenizer, scorer.config, **how)
    return load_llm(args.llm or "", model, scorer.trainer.args.device, **how)


def settings_of(model: ModelArguments, args: PromptArguments) -> dict[str, Any]:
    """All that the result of a search depends on."""
    names = ("task", "data_dir", "train_file", "rounds", "keep", "num_search", "num_dev", "max_length", "truncate", "seed")
    of_llm = ("llm", "max_new_tokens", "temperature")
    files = {name: _digest(getattr(args, name)) for name in ("task", "templates") if Path(getattr(args, name) or "").is_file()}
    values = {name: getattr(args, name) for name in (*names, *(of_llm if args.llm is not None else ()))}
    return {"model": model.model_name_or_path, **values, "templates": args.templates, "files": files}


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class _Search:
    """One search from its beginning, or its log, to the files of its folder."""

    def __init__(self, place: Workplace, finder: Finder, log: SearchLog, folder: Path, say: Say):
        self.place, self.finder, self.log, self.folder, self.say = place, finder, log, folder, say
        self.args, self.metric = place.args, place.task.metrics[0]

    def carry_out(self, began: float) -> SearchResult:
        place = self.place
        try:
            found = self.finder.finalists(self.log, self.say)
            searched = place.sequences
            best, before, after = self._choose(found)
        except ValueError:  # in a later round, such as a problem that outgrew the context of --llm
            if self.finder.best != place.start:
                self._write(self.finder.best, f"the best so far of a search that failed, see {LOG_FILE}")
            raise
        except KeyboardInterrupt:
            self._write(self.finder.best, f"the best so far of a search that was interrupted, see {LOG_FILE}")
            raise KeyboardInterrupt(
                f"Interrupted; {self.folder / BEST_FILE} holds the best template so far. The same command goes on."
            ) from None
        self._write(best, f"found by zotune prompt: {self.metric} {metric_text(self.metric, after)} on held-out rows")
        evaluation = self._evaluated(best)
        summary = {
            "task": self.args.task,
            "model": self.log.settings["model"],
            "metric": self.metric,
            **self.finder.facts(),
            "prompt": best.prompt,
            "options": list(best.options),
            "held_out": {"before": before, "after": after, "rows": len(place.held_out)},
            "evaluation": evaluation,
            "sequences": {"search": searched, "all": place.sequences},
            "seconds": time.perf_counter() - began,
            "file": str(self.folder / BEST_FILE),
        }
        write_json(self.folder / SUMMARY_FILE, summary)
        return SearchResult(self.folder, best, summary)

    def _choose(self, finalists: list[Candidate]) -> tuple[Candidate, float, float]:
        """The best of the finalists and the task's own candidate by the metric on held-out rows, of equals by the loss; that of both."""
        place = self.place
        found = {(each["prompt"], tuple(each["options"])): each for each in self.log.of_kind("held_out")}
        for candidate in dict.fromkeys([place.start, *finalists]):
            key = (candidate.prompt, candidate.options)
            if key not in found:
                scores = place.scores(candidate, place.held_out)
                event = {"prompt": candidate.prompt, "options": list(candidate.options), "loss": scores.loss, "value": scores.value}
                found[key] = {**event, "sequences": place.sequences}
                self.log.add({"event": "held_out", **found[key]})
            place.count_at_least(found[key]["sequences"])
        best = min(found.values(), key=lambda each: (-each["value"], each["loss"]))
        return Candidate(best["prompt"], tuple(best["options"])), found[(place.start.prompt, place.start.options)]["value"], best["value"]

    def _evaluated(self, best: Candidate) -> dict[str, Any] | None:
        """The main metric before and after on rows that nothing was chosen by."""
        place, rows = self.place, self.place.evaluation
        if rows is None:
            return None
        before = place.scores(place.start, rows).value
        after = before if best == place.start else place.scores(best, rows).value
        return {"before": before, "after": after, "rows": len(rows)}

    def _write(self, candidate: Candidate, note: str) -> None:
        write_task(self.folder / BEST_FILE, self.args.task or "", self.place.task, candidate, note)
