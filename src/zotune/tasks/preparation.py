"""Data for a trainer from names and files, with all checks before any work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from zotune.tasks import labels, loader
from zotune.tasks.chat import ChatOptions, read_tools, variables_of
from zotune.tasks.collators import ChoicesCollator, ClassifierCollator, GenerationCollator, LanguageModelCollator, MaskedCollator
from zotune.tasks.columns import format_of, parsed_columns
from zotune.tasks.encoding import Encoder, context_limit, pad_token_id
from zotune.tasks.families import check_idle, family_name, prepare_family
from zotune.tasks.family import Family, FamilyInputs
from zotune.tasks.head_labels import check_problem
from zotune.tasks.masked import TEMPLATE, encode_masked
from zotune.tasks.metrics import ComputeAnswerMetrics, ComputeMetrics
from zotune.tasks.model_kind import ModelKind
from zotune.tasks.objective_choice import is_encoder, is_seq2seq, objectives_of
from zotune.tasks.packing import block_of, check_packing, packed
from zotune.tasks.pairs import are_chats
from zotune.tasks.prompts import RewardCollator, encode_prompts, is_chat, stop_tokens
from zotune.tasks.reading import DataSource
from zotune.tasks.rows import Rows
from zotune.tasks.sources import clean, demonstrated, demonstrated_anew, sample, split_train
from zotune.tasks.streams import Stream
from zotune.tasks.task import Task
from zotune.tasks.vocabulary import check_vocabulary
from zotune.weights.structure import text_config


@dataclass(frozen=True)
class PreparedData:
    """Encoded data, their collators, objectives and metrics.

    Attributes:
        train, dev, eval: encoded examples; None where there are none.
        collate_train, collate_eval: examples → batch; `collate_eval` for dev and eval.
        train_objective, eval_objective: names for :func:`zotune.objectives.objective`.
        compute_metrics: callable for a Trainer, or None where there is only a loss.
        main_metric: ``"accuracy"``, ``"token_f1"`` ... or ``"loss"``.
        task: None for text without a task.
        num_labels, label_names: of the labels; None and () where there are none.
        chats: whether the training data (else those to evaluate on) are messages.
        texts: the first texts that were encoded, of a few rows; none of chats.
        train_rows, eval_rows: the rows of `train` and `eval`, in their order.
        files: JSON files that are saved with the model, by name.
        processor: of images and text, saved with the model; None: the tokenizer is.
        kind: of the model that the data are for.
        task_file: the content of a task file that was made of rows with a label; None for other data.
    """

    train: list[dict[str, Any]] | None
    dev: list[dict[str, Any]] | None
    eval: list[dict[str, Any]] | None
    collate_train: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    collate_eval: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    train_objective: str
    eval_objective: str
    compute_metrics: Callable[[Any], dict[str, float]] | None
    main_metric: str
    task: Task | None = None
    num_labels: int | None = None
    label_names: tuple[str, ...] = ()
    chats: bool = False
    texts: tuple[str, ...] = ()
    train_rows: Rows | None = field(default=None, compare=False)
    eval_rows: Rows | None = field(default=None, compare=False)
    files: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = field(default=None, compare=False)
    kind: ModelKind = field(default_factory=ModelKind)
    task_file: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def masked(self) -> bool:
        """Whether label words are scored at masks, by the head of a masked language model."""
        return self.train_objective == "mlm"

    def optimized(self, rewards: Sequence[str] | None) -> dict[str, Any]:
        """The arguments of a trainer that say what is optimized: objectives, or the reward functions of prompts."""
        if self.train_objective == "reward":
            return {"reward_funcs": rewards}
        return {"objective": self.train_objective, "eval_objective": self.eval_objective}


def prepare(
    tokenizer: Any,
    model_config: Any = None,
    *,
    task: str | Path | Task | None = None,
    data_dir: str | Path | None = None,
    train_file: str | Path | None = None,
    eval_file: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_train_split: str | None = None,
    dataset_test_split: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    template: str | None = None,
    options: Sequence[str] | Mapping[Any, str] | None = None,
    objective: str | None = None,
    num_train: int | None = None,
    num_dev: int | None = None,
    num_eval: int | None = None,
    k_shot: int | None = None,
    num_demonstrations: int | None = None,
    demonstrations_per: str = "run",
    loss_over: str = "examples",
    problem_type: str | None = None,
    bos_token: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    packing: bool = False,
    tools: str | Path | Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
    max_completion_length: int = 0,
    parts: Collection[str] = ("train", "eval"),
) -> PreparedData:
    """Loads, checks, subsets and encodes the data of a run.

    Args:
        tokenizer: a Hugging Face tokenizer; None for models of images or sound.
        model_config: the model's configuration, for the context length and whether it is an encoder.
        task: bundled task, path of a YAML file, or a loaded :class:`Task`.
        data_dir: folder with ``<task>/<split>.jsonl[.gz]``; without it a task's rows come from the hub.
        train_file, eval_file: files (:func:`zotune.tasks.files.read_rows`) with the task's columns, or without a task with prompt and
            completion, instruction and output, text and label, text, or messages.
        dataset_name, dataset_config, dataset_train_split, dataset_test_split: see :class:`zotune.tasks.reading.DataSource`.
        streaming: read of the data set only the first `num_train`, `num_dev` and `num_eval` rows, in an order drawn by seed.
        columns: what columns are called here -> in the data, such as ``{"text": "body"}``.
        template, options: see :func:`zotune.tasks.load`; also of rows with a label.
        objective: training loss: ``"lm"`` (over the right option's tokens; the default), ``"choices"``
            (cross-entropy over the options' scores), ``"accuracy"`` (whether the best score is the right option's), ``"classifier"``
            (the default for encoder models), ``"mlm"`` (cross-entropy over label words at the ``<mask>`` of a prompt, by the head of a
            masked language model; the default where a template has one) or ``"reward"`` (prompts, whose completions are rewarded).
        num_train, num_eval: most rows, drawn by `seed`.
        num_dev: training rows held out.
        k_shot: training rows per class.
        num_demonstrations: training rows, drawn by `seed`, solved before every evaluated prompt.
        demonstrations_per: ``"run"`` (the same rows for all prompts) or ``"example"`` (others for each).
        loss_over: of the objective ``"lm"``: ``"examples"`` (the mean of their own means) or ``"tokens"`` (of a batch).
        problem_type: of a classification head on rows with text and label, as transformers names it; None: as the labels say.
        bos_token: starts a prompt, in place of the tokenizer's own.
        max_length: most input tokens, if shorter than the model's context.
        truncate: cut what is too long instead of raising; the log says how many rows were cut.
        packing: texts are joined and cut into blocks of `max_length` (:func:`zotune.tasks.packing.packed`).
        tools: JSON schemas of the tools of chats, or a JSON file of them; a row's own column comes first.
        chat_template_kwargs: variables of the chat template; those of a row come first.
        seed: seed of the subsets.
        pad_to_multiple_of: round batch lengths up to a multiple of this.
        max_completion_length: of a reward: tokens that must fit behind a prompt.
        parts: which of ``"train"`` (with dev) and ``"eval"`` to load.

    Raises:
        ValueError: something is missing, malformed, too long or contradictory; one sentence with the fix.
    """
    counts = {"num_train": num_train, "num_dev": num_dev, "num_eval": num_eval, "k_shot": k_shot}
    counts["num_demonstrations"] = num_demonstrations
    for name, value in counts.items():
        if value is not None and value < (0 if name == "num_dev" else 1):
            raise ValueError(f"{name}={value} must be positive; leave it out to use every row.")
    if isinstance(task, (str, Path)):
        if objective == "mlm" and template is None:
            usual = loader.load(task)
            template = TEMPLATE if TEMPLATE in usual.templates and not usual.has_mask else None
        task = loader.load(task, template=template, options=options)
    elif task is not None and (template is not None or options is not None):
        raise ValueError("template and options need the name or path of a task: pass --task.")
    source = DataSource(
        data_dir, train_file, eval_file, dataset_name, dataset_config, dataset_train_split, dataset_test_split, parsed_columns(columns),
        _stream(num_train, num_dev, num_eval, k_shot, seed) if streaming else None,
    )  # fmt: skip
    train_rows = eval_rows = task_file = form = None
    if task is None:
        train_rows = source.train(None) if train_file is not None or "train" in parts else None
        eval_rows = source.eval(None) if "eval" in parts else None
        rows = train_rows if train_rows is not None else eval_rows
        form = family_name(model_config, None, objective, rows)
        task_file = None if form is not None else _task_file(rows, source, objective, model_config, template)
        if task_file is not None:
            task = loader.task_of(task_file, str(task_file["title"]), template, options)
        elif template is not None or options is not None:
            raise ValueError("template and options need the name or path of a task, or rows with a label: pass --task.")
    elif tokenizer is None or (is_seq2seq(model_config) and objective in (None, "lm")):
        form = family_name(model_config, task, objective, None) or "seq2seq"
    check_problem(problem_type, form)
    check_idle(form, bos_token=bos_token, tools=tools, chat_template_kwargs=chat_template_kwargs)
    if form == "media":
        check_idle(form, what="texts", max_length=max_length, truncate=truncate, packing=packing)
    train_objective, eval_objective = ("family",) * 2 if form is not None else objectives_of(objective, task, model_config)
    if loss_over != "examples" and (loss_over != "tokens" or train_objective != "lm"):
        raise ValueError(f"loss_over={loss_over!r} is 'examples', or with the objective 'lm' 'tokens', and this is {train_objective!r}.")
    if demonstrations_per != "run" and (demonstrations_per != "example" or num_demonstrations is None):
        raise ValueError(f"demonstrations_per={demonstrations_per!r} is 'run', or with num_demonstrations 'example'.")
    if bos_token is not None and train_objective in ("classifier", "mlm"):
        raise ValueError("bos_token starts the prompts of causal language models, and an encoder has its own: leave it out.")
    if train_objective == "classifier" and (template is not None or options is not None):
        raise ValueError("a sequence-classification head reads a task's columns and has no prompt: leave template and options out.")

    limit, users = context_limit(tokenizer, model_config, max_length)
    if packing:
        shown = train_rows if train_rows is not None else eval_rows
        chosen = task is not None or train_objective != "lm" or shown is None
        check_packing(tokenizer, "" if chosen or shown is None else format_of(shown)[0], truncate=truncate, chosen=chosen)
    encoder = Encoder(tokenizer, None if packing else limit, truncate, users, _chat_options(tools, chat_template_kwargs, task), bos_token)
    padding: dict[str, Any] = {"pad_token_id": pad_token_id(tokenizer), "pad_to_multiple_of": pad_to_multiple_of}
    if train_objective == "classifier" or form == "labelled":
        _align_padding(model_config, padding["pad_token_id"])

    references: list[tuple[str, ...]] = []  # of the dev and eval examples of a generation task

    def encode(rows: Rows | None, task: Task | None = task, evaluated: bool = False) -> list[dict[str, Any]] | None:
        if rows is None:
            return None
        if family is not None:
            return family.encode(rows, evaluated)
        if train_objective == "reward":
            return encode_prompts(encoder, rows, task, max_completion_length=max_completion_length)
        if task is None:
            examples = encoder.completions(rows)
            return list(packed(examples, block_of(limit, users=users))) if packing else examples
        if task.generation and train_objective == "lm":
            examples = encoder.answers(rows, task, (task.max_new_tokens or 0) if evaluated else 0)
            if evaluated:
                for example, row in zip(examples, rows, strict=True):
                    example["reference"] = len(references)
                    references.append(task.references(row))
            return examples
        if train_objective == "mlm":
            return encode_masked(encoder, rows, task)
        return encoder.classifier(rows, task) if train_objective == "classifier" else encoder.choices(rows, task)

    if num_demonstrations is not None and (task is None or eval_objective not in ("choices", "generation", "mlm")):
        raise ValueError("num_demonstrations needs a task with prompts, and a causal or masked language model: pass --task.")
    if task is not None and task_file is None:
        train_rows = source.train(task) if "train" in parts or num_demonstrations is not None else None
        eval_rows = source.eval(task) if "eval" in parts else None
    elif task is not None:
        train_rows, eval_rows = (None if rows is None else clean(rows, task) for rows in (train_rows, eval_rows))
    family: Family | None = None
    if form is not None:
        family = prepare_family(form, FamilyInputs(encoder, model_config, train_rows, eval_rows, padding, problem_type, task))
        train_objective, eval_objective = family.train_objective, family.eval_objective
    if data_dir is not None and (task is None or ("train" in parts and train_file is not None and eval_file is not None)):
        raise ValueError(
            "data_dir holds the rows of tasks, and none of them is read: pass --task without both files, or leave data_dir out."
        )
    if num_eval is not None and "eval" in parts and eval_rows is None:
        raise ValueError("num_eval draws evaluation rows, and there are none: pass --eval_file, or leave num_eval out.")
    if train_rows is None and eval_rows is None:
        raise ValueError("nothing to evaluate: pass --task (list them with `zotune tasks`) or --eval_file.")
    if k_shot is not None and task is not None and task.gold:
        raise ValueError(f"task {task.name!r} has no classes to take k_shot={k_shot} examples of: use num_train.")
    dev_rows = None
    if train_rows is not None:
        answers = train_rows.map(task.answer) if k_shot is not None and task is not None else None
        train_rows, dev_rows = split_train(train_rows, seed=seed, num_train=num_train, num_dev=num_dev, k_shot=k_shot, answers=answers)
    eval_task = task
    if num_demonstrations is not None:
        assert task is not None and train_rows is not None
        if num_demonstrations > len(train_rows):
            raise ValueError(f"num_demonstrations={num_demonstrations}, but there are {len(train_rows)} training rows: choose fewer.")
        if demonstrations_per == "example":
            eval_task = demonstrated_anew(task, train_rows, num_demonstrations, seed=seed)
        else:
            eval_task = demonstrated(task, sample(train_rows, num_demonstrations, seed=seed))
    if "train" not in parts:
        train_rows = dev_rows = None
    if eval_rows is not None:
        eval_rows = sample(eval_rows, num_eval, seed=seed)
    rewarded = train_objective == "reward"
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    if task is not None and not rewarded:
        compute_metrics = ComputeMetrics(task.metrics)
    if task is not None and eval_objective == "generation":
        compute_metrics = ComputeAnswerMetrics(partial(tokenizer.decode, skip_special_tokens=True), references, task.metrics)
    shown = train_rows if train_rows is not None else eval_rows
    train, dev, evaluated = encode(train_rows), encode(dev_rows, eval_task, evaluated=True), encode(eval_rows, eval_task, evaluated=True)
    if rewarded:
        padding["stops"] = stop_tokens(encoder, train or evaluated or (), task)
    collate = partial(_collator, task=task, encoder=encoder, padding=padding)
    examples: Iterable[Mapping[str, Any]] = chain(train or (), dev or (), evaluated or ())
    if family is not None:
        examples = ({"input_ids": ids} for example in examples for ids in family.ids(example))
    check_vocabulary(tokenizer, model_config, padding["pad_token_id"], examples)
    if family is not None:
        return prepared_family(family, train, dev, evaluated, tuple(encoder.texts), train_rows)
    return PreparedData(
        train=train,
        dev=dev,
        eval=evaluated,
        collate_train=collate(train_objective, over_tokens=loss_over == "tokens"),
        collate_eval=collate(eval_objective),
        train_objective=train_objective,
        eval_objective=eval_objective,
        compute_metrics=compute_metrics,
        main_metric="reward" if rewarded else "loss" if task is None else task.metrics[0],
        task=task,
        num_labels=None if task is None or not task.labels else len(task.labels),
        label_names=() if task is None else task.label_names,
        chats=is_chat(train or evaluated or ()) if rewarded else task is None and _chats(shown, tokenizer),
        texts=tuple(encoder.texts),
        train_rows=train_rows,
        eval_rows=eval_rows,
        kind=_kind(train_objective, task),
        task_file=task_file,
    )


def _stream(num_train: int | None, num_dev: int | None, num_eval: int | None, k_shot: int | None, seed: int) -> Stream:
    if num_train is None or k_shot is not None:
        raise ValueError("streaming reads as many rows as num_train says: give --num_train, and no k_shot.")
    return Stream(num_train + (num_dev or 0), num_eval, seed)


def _chats(rows: Rows | None, tokenizer: Any) -> bool:
    return rows is not None and are_chats(rows, format_of(rows), tokenizer)


def _task_file(
    rows: Rows | None, source: DataSource, objective: str | None, model_config: Any, template: str | None
) -> dict[str, Any] | None:
    """The content of a task file for rows with a label, whose values a causal language model chooses among; None for other rows."""
    causal = objective in (None, "lm", "choices", "accuracy") and not is_encoder(model_config)
    if rows is None or not causal or not labels.is_labeled(rows, template):
        return None
    name = str(source.train_file or source.dataset_name or source.eval_file)
    return labels.task_of(rows, name, source.columns.get(labels.LABEL, labels.LABEL), template)


def _kind(objective: str, task: Task | None) -> ModelKind:
    if objective == "classifier" and task is not None:
        return ModelKind("classifier", task.label_names)
    return ModelKind("masked" if objective == "mlm" else "causal")


def _chat_options(tools: Any, variables: Mapping[str, Any] | None, task: Task | None) -> ChatOptions | None:
    """The options of chats; None where there are none."""
    if tools is None and not variables:
        return None
    if task is not None:
        raise ValueError("tools and chat_template_kwargs are for rows with messages, and a task has prompts: leave them out.")
    if isinstance(tools, str | Path):
        tools = read_tools(tools)
    return ChatOptions(None if tools is None else list(tools), variables_of(dict(variables or {})))


def _align_padding(model_config: Any, padding: int) -> None:
    """A decoder with a classification head scores the last token that is not its own padding: this id is to be the tokenizer's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind, config = getattr(model_config, "model_type", None), text_config(model_config)
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if decoder or getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = padding


def _collator(objective: str, task: Task | None, encoder: Encoder, padding: Mapping[str, Any], over_tokens: bool = False) -> Any:
    if objective == "lm":
        return LanguageModelCollator(**padding, over_tokens=over_tokens)
    if objective in ("choices", "accuracy"):
        return ChoicesCollator(**padding, length_normalize=task is not None and task.length_normalize)
    if objective == "generation":
        assert task is not None and task.max_new_tokens is not None
        return GenerationCollator(**padding, max_new_tokens=task.max_new_tokens, stop_ids=tuple(encoder.answer_ends()))
    collators = {"classifier": ClassifierCollator, "mlm": MaskedCollator, "reward": RewardCollator}
    return collators[objective](**padding)


def prepared_family(family: Family, train: Any, dev: Any, evaluated: Any, texts: tuple[str, ...], rows: Rows | None) -> PreparedData:
    """The data of a family."""
    return PreparedData(
        train,
        dev,
        evaluated,
        family.collate_train,
        family.collate_eval,
        family.train_objective,
        family.eval_objective,
        family.compute_metrics,
        family.compute_metrics.metrics[0],
        num_labels=len(family.kind.labels) or None,
        label_names=family.kind.labels,
        texts=texts,
        train_rows=rows,
        kind=family.kind,
        files=family.files,
        processor=family.processor,
    )
