"""One search as a function: :func:`search` loads model and rows, ranks templates, keeps the best by held-out rows, writes the task file."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from zotune.io.json_files import write_json
from zotune.io.lock import locked
from zotune.io.text import metric_text
from zotune.prompting.arguments import PromptArguments
from zotune.prompting.candidate import Candidate, as_task, check_task
from zotune.prompting.halving import Halving, Ranked
from zotune.prompting.scoring import Scorer, Scores, fit_words
from zotune.prompting.search_log import BEST_FILE, LOG_FILE, SUMMARY_FILE, SearchLog
from zotune.prompting.space import Space, distinct, space_of
from zotune.prompting.task_file import write_task
from zotune.tasks import Encoder, Rows, Task, context_limit, is_encoder, load, load_rows, read_jsonl
from zotune.tasks.masked import TEMPLATE
from zotune.tasks.preparation import has_eval_rows
from zotune.tasks.sources import clean, sample, split_train
from zotune.training.arguments import ModelArguments
from zotune.training.config import ZOConfig
from zotune.training.loading import load_model, load_tokenizer, plan_model

Say = Callable[[str], None]


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


@dataclass
class Workplace:
    """What every kind of search needs: the task, its rows in three parts, and a scorer.

    Attributes:
        start: the candidate that the task begins with, its default template.
        search, held_out, evaluation: rows; those to search on in random order; None: no evaluation at the end.
    """

    args: PromptArguments
    task: Task
    start: Candidate
    scorer: Scorer
    search: Rows
    held_out: Rows
    evaluation: Rows | None

    def scores(self, candidate: Candidate, rows: Rows) -> Scores:
        """Scores of a candidate on rows, as `zotune eval` evaluates it."""
        return self.scorer.score(as_task(self.args.task or "", self.task, candidate, masked=self.scorer.masked), rows)


def search(model: ModelArguments, args: PromptArguments, say: Say = lambda line: None) -> SearchResult:
    """Searches a prompt for a task without a language model's advice.

    Args:
        model: which model reads the prompts.
        args: task, rows and candidates.
        say: receives lines of progress.

    Raises:
        ValueError, FileNotFoundError: an invalid request; nothing is written.
        KeyboardInterrupt: interrupted; the task file holds the best so far.
    """
    began, folder = time.perf_counter(), Path(args.output_dir or "").expanduser()
    log = SearchLog(folder, settings_of(model, args))
    with tempfile.TemporaryDirectory(prefix="zotune-prompt-") as scratch:
        place = workplace(model, args, scratch)
        space = space_of(args.task or "", place.task, args.templates, masked=place.scorer.masked)
        space = Space(space.templates, place.scorer.usable(space.words, place.task, short=space.built_in_words))
        _check_words(space, place.task)
        with locked(folder):
            log = SearchLog(folder, log.settings)  # another process may have worked in the folder since
            return _Search(place, space, log, folder, say).carry_out(began)


def settings_of(model: ModelArguments, args: PromptArguments) -> dict[str, Any]:
    """All that the result of a search depends on."""
    names = ("task", "data_dir", "train_file", "rounds", "keep", "num_search", "num_dev", "max_length", "truncate", "seed")
    files = {name: _digest(getattr(args, name)) for name in ("task", "templates") if Path(getattr(args, name) or "").is_file()}
    return {"model": model.model_name_or_path, **{name: getattr(args, name) for name in names}, "templates": args.templates, "files": files}


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def workplace(model: ModelArguments, args: PromptArguments, scratch: str) -> Workplace:
    """Loads the task, its rows and the model; ValueError, FileNotFoundError for an invalid request."""
    source = args.task or ""
    task = load(source)
    check_task(task)
    plan = plan_model(model, "zotune prompt")
    masked = _masked(plan.config)
    if masked and not task.has_mask and TEMPLATE in task.templates:
        task = load(source, template=TEMPLATE)
    tokenizer = load_tokenizer(plan, model)
    searched, held_out = split_train(_rows(task, "train", args), seed=args.seed, num_train=args.num_search, num_dev=args.num_dev)
    assert held_out is not None, "num_dev is 1 or more"
    order = list(range(len(searched)))
    Random(f"{args.seed}/prompt").shuffle(order)
    evaluated = args.num_eval != 0 and has_eval_rows(source, args.data_dir, args.train_file, args.eval_file)
    evaluation = sample(_rows(task, "eval", args), args.num_eval, seed=args.seed) if evaluated else None
    limit, users = context_limit(tokenizer, plan.config, args.max_length)
    encoder = Encoder(tokenizer, limit, args.truncate, users)
    training = ZOConfig(
        output_dir=scratch,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        use_cpu=args.use_cpu,
        disable_tqdm=True,
    )
    network, _ = load_model(plan, model, training.device, masked=masked)
    engine = None if plan.engine is None else plan.engine.engine
    scorer = Scorer(network, tokenizer, plan.config, encoder, training, masked=masked, engine=engine)
    start = Candidate(task.prompt, task.options)
    if masked and not task.has_mask:
        raise ValueError(f"task {task.name!r} has no template with a <mask>: write one named {TEMPLATE!r} into a task file of your own.")
    return Workplace(args, task, start, scorer, searched.select(order), held_out, evaluation)


def _masked(config: Any) -> bool:
    """Whether the model fills a mask; ValueError for a classifier or an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model: use a causal language model or an encoder.")
    if any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ()):
        raise ValueError("a sequence classifier reads no prompt: use a causal or a masked language model.")
    return is_encoder(config)


def _rows(task: Task, split: str, args: PromptArguments) -> Rows:
    file = args.train_file if split == "train" else args.eval_file
    return load_rows(task, split, args.data_dir) if file is None else clean(read_jsonl(Path(file).expanduser()), task)


def _check_words(space: Space, task: Task) -> None:
    """ValueError where the classes cannot have different label words."""
    import numpy as np

    words = distinct(space.words)
    groups = [[words.index(word) for word in group] for group in space.words]
    if fit_words(Scores(np.zeros((1, len(words))), np.zeros(1, dtype=int)), groups) is None:
        raise ValueError(f"the classes {', '.join(task.label_names)} cannot have different label words: list more of them under words.")


class _Search:
    """One search from its beginning, or its log, to the files of its folder."""

    def __init__(self, place: Workplace, space: Space, log: SearchLog, folder: Path, say: Say):
        self.place, self.space, self.log, self.folder, self.say = place, space, log, folder, say
        self.args, self.metric = place.args, place.task.metrics[0]
        self.halving = Halving(place.scorer, place.task, space, place.search, rounds=self.args.rounds, keep=self.args.keep)
        self.best = place.start
        self.before = 0  # sequences that earlier processes scored

    @property
    def sequences(self) -> int:
        """Sequences that this search has scored."""
        return self.before + self.place.scorer.sequences

    def carry_out(self, began: float) -> SearchResult:
        place, space, rows = self.place, self.space, len(self.place.search)
        self.say(
            f"{len(space.templates)} templates, {' × '.join(str(len(group)) for group in space.words)} label words; {rows} rows to search "
            f"on, {len(place.held_out)} held out"
        )
        try:
            ranked = self._rounds()
            searched = self.sequences
            best = self._choose(ranked)
        except KeyboardInterrupt:
            self._write(self.best, f"the best so far of a search that was interrupted, see {LOG_FILE}")
            raise KeyboardInterrupt(
                f"Interrupted; {self.folder / BEST_FILE} holds the best template so far. The same command goes on."
            ) from None
        self._write(best["candidate"], f"found by zotune prompt: {self.metric} {metric_text(self.metric, best['value'])} on held-out rows")
        summary = {
            "task": self.args.task,
            "model": self.log.settings["model"],
            "metric": self.metric,
            "candidates": space.size,
            "templates": len(space.templates),
            "prompt": best["candidate"].prompt,
            "options": list(best["candidate"].options),
            "held_out": {"before": best["before"], "after": best["value"], "rows": len(place.held_out)},
            "evaluation": self._evaluated(best["candidate"]),
            "sequences": {"search": searched, "all": self.sequences, "every_template_on_every_row": rows * len(space.templates)},
            "seconds": time.perf_counter() - began,
            "file": str(self.folder / BEST_FILE),
        }
        write_json(self.folder / SUMMARY_FILE, summary)
        return SearchResult(self.folder, best["candidate"], summary)

    def _rounds(self) -> list[Ranked]:
        templates, ranked = list(range(len(self.space.templates))), list[Ranked]()
        done = self.log.of_kind("round")
        for number, size in enumerate(self.halving.sizes):
            if number < len(done):
                ranked = [_restored(each) for each in done[number]["kept"]]
                self.before = done[number]["sequences"]
            else:
                ranked = self.halving.round(number, templates)
                kept = [_entry(each) for each in ranked]
                self.log.add({"event": "round", "round": number + 1, "rows": size, "sequences": self.sequences, "kept": kept})
                best = (
                    f"loss {ranked[0].loss:.4f}, {self.metric} {metric_text(self.metric, ranked[0].value)}, {ranked[0].candidate.prompt!r}"
                )
                self.say(f"round {number + 1} of {len(self.halving.sizes)}: {len(templates)} templates on {size} rows; best: {best}")
            templates, self.best = [each.template for each in ranked], ranked[0].candidate
        return ranked

    def _choose(self, ranked: list[Ranked]) -> dict[str, Any]:
        """The best of the last round's candidates and the task's own, by the metric on held-out rows, of equals by the loss."""
        found = {(each["prompt"], tuple(each["options"])): each for each in self.log.of_kind("held_out")}
        for candidate in dict.fromkeys([self.place.start, *(each.candidate for each in ranked)]):
            key = (candidate.prompt, candidate.options)
            if key not in found:
                scores = self.place.scores(candidate, self.place.held_out)
                event = {"prompt": candidate.prompt, "options": list(candidate.options), "loss": scores.loss, "value": scores.value}
                found[key] = {**event, "sequences": self.sequences}
                self.log.add({"event": "held_out", **found[key]})
            self.before = max(self.before, found[key]["sequences"] - self.place.scorer.sequences)
        best = min(found.values(), key=lambda each: (-each["value"], each["loss"]))
        self.best = Candidate(best["prompt"], tuple(best["options"]))
        before = found[(self.place.start.prompt, self.place.start.options)]["value"]
        return {"candidate": self.best, "value": best["value"], "before": before}

    def _evaluated(self, best: Candidate) -> dict[str, Any] | None:
        """The main metric before and after on rows that nothing was chosen by."""
        rows = self.place.evaluation
        if rows is None:
            return None
        before = self.place.scores(self.place.start, rows).value
        after = before if best == self.place.start else self.place.scores(best, rows).value
        return {"before": before, "after": after, "rows": len(rows)}

    def _write(self, candidate: Candidate, note: str) -> None:
        write_task(self.folder / BEST_FILE, self.args.task or "", self.place.task, candidate, note)


def _entry(ranked: Ranked) -> dict[str, Any]:
    candidate = ranked.candidate
    options = list(candidate.options)
    return {"template": ranked.template, "prompt": candidate.prompt, "options": options, "loss": ranked.loss, "value": ranked.value}


def _restored(entry: dict[str, Any]) -> Ranked:
    return Ranked(entry["template"], Candidate(entry["prompt"], tuple(entry["options"])), entry["loss"], entry["value"])
