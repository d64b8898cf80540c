"""What every kind of search works on: the task, its rows in three parts, and a scorer with the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from zotune.prompting.arguments import PromptArguments
from zotune.prompting.candidate import Candidate, as_task, check_task
from zotune.prompting.scoring import Scorer, Scores
from zotune.tasks import Encoder, Rows, Task, context_limit, is_encoder, load, load_rows
from zotune.tasks.files import read_rows
from zotune.tasks.masked import TEMPLATE
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.reading import has_eval_rows
from zotune.tasks.sources import clean, sample, split_train
from zotune.training.arguments import ModelArguments
from zotune.training.config import ZOConfig
from zotune.training.loading import load_model, load_tokenizer, plan_model


@dataclass
class Workplace:
    """What every kind of search needs: the task, its rows in three parts, and a scorer.

    Attributes:
        start: the candidate that the task begins with, its default template.
        search, held_out, evaluation: rows; those to search on in random order; None: no evaluation at the end.
        before: sequences that earlier processes of this search scored.
    """

    args: PromptArguments
    task: Task
    start: Candidate
    scorer: Scorer
    search: Rows
    held_out: Rows
    evaluation: Rows | None
    before: int = 0

    @property
    def sequences(self) -> int:
        """Sequences that this search has scored."""
        return self.before + self.scorer.sequences

    def count_at_least(self, sequences: int) -> None:
        """Counts what earlier processes scored, of which the log says how many there were at an event."""
        self.before = max(self.before, sequences - self.scorer.sequences)

    def as_task(self, candidate: Candidate) -> Task:
        """The task with a candidate's prompt and options; ValueError for an invalid candidate."""
        return as_task(self.args.task or "", self.task, candidate, masked=self.scorer.masked)

    def scores(self, candidate: Candidate, rows: Rows) -> Scores:
        """Scores of a candidate on rows, as `zotune eval` evaluates it."""
        return self.scorer.score(self.as_task(candidate), rows)


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
    network, _ = load_model(plan, model, training.device, kind=ModelKind("masked" if masked else "causal"))
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
    return load_rows(task, split, args.data_dir) if file is None else clean(read_rows(Path(file).expanduser()), task)
