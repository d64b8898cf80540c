"""Rows → encoded examples: token ids of prompts, options, completions, chats and classifier inputs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from zotune.tasks.chat import ChatOptions
from zotune.tasks.chat_tokens import CUT, ChatTokens
from zotune.tasks.columns import format_of, unused
from zotune.tasks.pairs import are_chats, chat_row, text_row
from zotune.tasks.rows import Rows
from zotune.tasks.task import Task

# Architectures whose positions start at the padding index + 1, so that fewer tokens fit.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text"}

# A tokenizer without a limit reports an enormous number.
_NO_LIMIT = 10**9

#: Texts that are kept of what was encoded.
TEXTS = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """Turns rows into encoded examples with one tokenizer under one length limit.

    Args:
        tokenizer: a Hugging Face tokenizer; special tokens are put before a prompt as it does by default.
        limit: most input tokens of the model, or None.
        truncate: cut what is too long (the beginning of a prompt, the end of a text, the oldest turns of a chat) instead of raising.
        limit_is_users: whether the limit is `max_length`, for the error message.
        chat: tools and template variables of chats without their own.
        bos_token: starts a prompt, in place of the tokenizer's own special tokens there.

    Attributes:
        texts: the first texts that were encoded, without those of chats.
        facts: what befell the row that is encoded now, for the log.
    """

    tokenizer: Any
    limit: int | None = None
    truncate: bool = False
    limit_is_users: bool = False
    chat: ChatOptions | None = None
    bos_token: str | None = None
    texts: list[str] = field(default_factory=list, repr=False, compare=False)
    facts: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _options: dict[tuple[str, str], list[int]] = field(default_factory=dict, repr=False, compare=False)

    def choices(self, rows: Rows, task: Task) -> list[dict[str, Any]]:
        """Examples ``{"prompt_ids", "option_ids", "answer"[, "right"]}``; `right`: all right options, of a task with candidates.

        Raises:
            ValueError: naming the row, for an unknown label or a prompt longer than the limit.
        """
        rendered = rows.map(lambda row: (*task.render(row), task.right(row)))

        def encode(prompt_ids: list[int], parts: tuple[str, tuple[str, ...], tuple[int, ...]]) -> dict[str, Any]:
            prompt, texts, right = parts
            option_ids = [self._continuation(prompt, text) for text in texts]
            if len(set(map(tuple, option_ids))) < len(option_ids):
                raise ValueError(f"two of the options {list(texts)} are the same tokens; choose others.")
            prompt_ids = self.fit_prompt(prompt_ids, max(map(len, option_ids)), "its longest option")
            example = {"prompt_ids": prompt_ids, "option_ids": option_ids, "answer": right[0]}
            return {**example, "right": list(right)} if task.candidates else example

        return self.map_rows(rows, encode, self.prompts([prompt for prompt, *_ in rendered]), rendered)

    def answers(self, rows: Rows, task: Task, max_new_tokens: int = 0) -> list[dict[str, Any]]:
        """Examples ``{"prompt_ids", "completion_ids"}`` of a generation task; the completion is the first right answer.

        Args:
            rows, task: which.
            max_new_tokens: tokens that must fit behind the prompt.

        Raises:
            ValueError: naming the row, for one without an answer, or a prompt longer than the limit.
        """
        rendered = rows.map(task.render)

        def encode(prompt_ids: list[int], parts: tuple[str, tuple[str, ...]]) -> dict[str, Any]:
            prompt, texts = parts
            completion_ids = self._continuation(prompt, texts[0])
            following, what = max((len(completion_ids), "its answer"), (max_new_tokens, "an answer may have"))
            return {"prompt_ids": self.fit_prompt(prompt_ids, following, what), "completion_ids": completion_ids}

        return self.map_rows(rows, encode, self.prompts([prompt for prompt, _ in rendered]), rendered)

    def answer_ends(self) -> list[int]:
        """Ids of the tokens that end an answer: the line break after a word, and the end of text."""
        return list(dict.fromkeys([self._continuation("a", "\n")[-1], *self._end()]))

    def completions(self, rows: Rows) -> list[dict[str, Any]]:
        """Examples ``{"prompt_ids", "completion_ids"[, "completion_mask"]}`` of rows without a task.

        Scored are: of ``messages`` the assistant's, of ``prompt`` and ``completion`` (``instruction`` and ``output``) the latter and the
        end-of-text token, of ``text`` every token.

        Raises:
            ValueError: other columns; or, naming the row, one that is malformed or too long.
        """
        columns = format_of(rows)
        are = are_chats(rows, columns, self.tokenizer)
        if self.chat is not None and not are:
            raise ValueError(f"tools and chat_template_kwargs are for rows with messages, and {rows.source} has none: leave them out.")
        left = unused(rows, columns, chats=are)
        if left:
            logger.warning("%s: used are the columns %s; not used: %s.", rows.source, " and ".join(columns), ", ".join(map(repr, left)))
        form = columns[0]
        chats = ChatTokens(self.tokenizer, self.chat, self.facts.add) if are else None

        def encoded(row: Mapping[str, Any]) -> dict[str, Any]:
            if chats is not None:
                return self._chat(chats, chat_row(row, form))
            return self._text(row) if form == "text" else self._completion(text_row(row, form))

        def checked(row: Mapping[str, Any]) -> dict[str, Any]:
            example = encoded(row)
            mask = example.get("completion_mask", [True])
            if not example["completion_ids"] or not any(mask) or (len(example["completion_ids"]) == 1 and not example["prompt_ids"]):
                raise ValueError(f"nothing to score in {' and '.join(map(repr, columns))}: it is empty or cut away.")
            return example

        try:
            return self.map_rows(rows, checked)
        finally:
            if chats is not None:
                chats.close()

    def classifier(self, rows: Rows, task: Task) -> list[dict[str, Any]]:
        """Examples ``{"input_ids"[, "token_type_ids"], "label"}`` of the task's one or two encoder texts."""
        if not task.fixed_options:
            raise ValueError(
                f"task {task.name!r} has answers of its own in every row, which a sequence-classification head cannot "
                "score: use a causal language model."
            )

        return self.map_rows(rows, lambda row: {**self.whole(*task.encoder_texts(row)), "label": task.answer(row)})

    def whole(self, *texts: Any, what: str = "text", **options: Any) -> dict[str, list[int]]:
        """input_ids, and token_type_ids where the tokenizer has them, of one text or a pair, with all special tokens.

        ``options``: of the tokenizer. ValueError where it is too long; with ``truncate`` its end is cut.
        """
        encoded = self.tokenizer(*texts, return_attention_mask=False, verbose=False, **options)
        if self.limit is not None and len(encoded["input_ids"]) > self.limit:
            if not self.truncate:
                raise ValueError(self.too_long(f"the {what} has {len(encoded['input_ids'])} tokens"))
            self.facts.add(CUT)
            cut = {"truncation": True, "max_length": self.limit}
            encoded = self.tokenizer(*texts, return_attention_mask=False, verbose=False, **cut, **options)
        return {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}

    def map_rows(self, rows: Rows, function: Callable[..., dict[str, Any]], *values: Iterable[Any]) -> list[dict[str, Any]]:
        """:meth:`Rows.map`, and a line of the log on what befell how many rows."""
        counts: Counter[str] = Counter()

        def counted(*parts: Any) -> dict[str, Any]:
            self.facts.clear()
            example = function(*parts)
            counts.update(self.facts)
            return example

        examples = rows.map(counted, *values)
        for fact, count in counts.items():
            share = f"{count} of {len(examples)} rows {'was' if count == 1 else 'were'}"
            logger.warning(
                "%s: %s", rows.source, fact.replace("{rows} cut", f"{share} cut").replace("{rows}", f"{count} of {len(examples)} rows")
            )
        return examples

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """Special tokens the tokenizer puts before and after a text by default."""
        whole, bare = self.ids("a", special=True), self.ids("a")
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    @cached_property
    def _start(self) -> list[int]:
        """The tokens that start a prompt; ValueError where the tokenizer lacks the given one."""
        if self.bos_token is None:
            return self.affixes[0]
        token = self.tokenizer.convert_tokens_to_ids(self.bos_token)
        if token is None or (token == self.tokenizer.unk_token_id and self.bos_token != self.tokenizer.unk_token):
            raise ValueError(f"--bos_token {self.bos_token!r} is no token of the tokenizer: leave it out, or give one of its vocabulary.")
        return [int(token)]

    def _keep(self, texts: Sequence[str]) -> None:
        self.texts.extend(texts[: max(0, TEXTS - len(self.texts))])

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens around it or without."""
        self._keep([text])
        return list(self.tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special tokens before a text and without those after it."""
        if not prompts:
            return []
        self._keep(prompts)
        encoded = self.tokenizer(list(prompts), return_attention_mask=False, verbose=False)["input_ids"]
        before, after = map(len, self.affixes)
        if self.bos_token is not None:
            encoded = [[*self._start, *ids[before:]] for ids in encoded]
        return [self._not_empty(list(ids[: len(ids) - after])) for ids in encoded]

    def _not_empty(self, ids: list[int]) -> list[int]:
        """The prompt; where it is empty, one token to predict the first from."""
        if ids:
            return ids
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [token]
        raise ValueError("the prompt is empty and the tokenizer has no token to start a text with: write a prompt.")

    def _continuation(self, prompt: str, text: str) -> list[int]:
        """Tokens of a text within a line, after the prompt's last character where that keeps its tokens.

        At the start of a line, SentencePiece tokenizers add a blank.
        """
        anchor = prompt[-1:]
        key = (anchor, text)
        if key not in self._options:
            before, joint = self.ids(anchor) if anchor else [], self.ids(anchor + text)
            ids = joint[len(before) :] if joint[: len(before)] == before else self.ids(text)
            if len(self._options) < 10_000:  # options repeat from row to row, completions do not
                self._options[key] = ids
            return list(ids)
        return list(self._options[key])

    def fit_prompt(self, prompt: list[int], following: int, what: str) -> list[int]:
        """The prompt, its beginning cut where it is too long; special tokens at its start are kept."""
        # The last token is predicted, not an input.
        excess = 0 if self.limit is None else len(prompt) + following - 1 - self.limit
        if excess <= 0:
            return prompt
        if not self.truncate:
            raise ValueError(self.too_long(f"the prompt has {len(prompt)} tokens and {what} {following}"))
        start = self._start
        keep = len(start) if prompt[: len(start)] == start else 0
        if len(prompt) - excess < keep + 1:
            raise ValueError(self.too_long(f"{what} has {following} tokens", cut=False))
        self.facts.add(CUT)
        return prompt[:keep] + prompt[keep + excess :]

    def too_long(self, fact: str, cut: bool = True) -> str:
        """The sentence for a row that exceeds the limit; ``cut``: whether --truncate helps."""
        if self.limit_is_users:
            fix = f"the --max_length of {self.limit}: raise --max_length" + (", or pass --truncate" if cut else "")
        else:
            fix = f"the model's context of {self.limit}: " + ("pass --truncate" if cut else "shorten it")
        return f"{fact}, more than {fix}{' to cut what is too long' if cut else ''}."

    def _completion(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        prompt_ids = self.prompts([prompt])[0]
        completion_ids = self._continuation(prompt, completion) if completion else []
        if completion_ids:
            completion_ids += self._end()
        return {
            "prompt_ids": self.fit_prompt(prompt_ids, len(completion_ids), "its completion"),
            "completion_ids": completion_ids,
        }

    def _text(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids = self.ids(_string(row, "text"))
        start = list(self._start)
        ids = ids + self._end() if ids else ids
        if self.limit is not None and len(start) + len(ids) - 1 > self.limit:
            if not self.truncate:
                raise ValueError(self.too_long(f"the text has {len(start) + len(ids)} tokens"))
            self.facts.add(CUT)
            ids = ids[: self.limit + 1 - len(start)]
        return {"prompt_ids": start, "completion_ids": ids}

    def _end(self) -> list[int]:
        """The end-of-text token, which teaches the model where an answer ends."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _chat(self, chats: ChatTokens, row: Mapping[str, Any]) -> dict[str, Any]:
        longest = None if self.limit is None else self.limit + 1  # the last token is predicted, not an input
        ids, scored, _ = chats.of_row(row, longest if self.truncate else None)
        if longest is not None and len(ids) > longest:
            what = "the last turn has, without what can be cut of its questions," if self.truncate else "the chat has"
            raise ValueError(self.too_long(f"{what} {len(ids)} tokens", cut=not self.truncate))
        start = scored.index(True) if True in scored else len(ids)
        example: dict[str, Any] = {"prompt_ids": ids[:start], "completion_ids": ids[start:]}
        mask = scored[start:]
        return example if all(mask) else {**example, "completion_mask": mask}


def context_limit(tokenizer: Any, model_config: Any, max_length: int | None = None) -> tuple[int | None, bool]:
    """Most input tokens of the model, and whether that is the user's `max_length`."""
    limits = []
    if model_config is not None:
        config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            if getattr(config, "model_type", None) in _OFFSET_POSITIONS:
                positions -= (config.pad_token_id or 0) + 1
            limits.append(positions)
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and longest < _NO_LIMIT:
        limits.append(int(longest))
    models = min(limits, default=None)
    if max_length is not None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length} is too short to hold a prompt and an answer; use 2 or more.")
        if models is None or max_length < models:
            return max_length, True
    return models, False


def pad_token_id(tokenizer: Any) -> int:
    """Id of the padding token, else of the end-of-text token (padding is masked), 0 without a tokenizer; ValueError where neither is."""
    if tokenizer is None:
        return 0
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "the tokenizer has neither a padding token nor an end-of-text token: set one, e.g. "
        'tokenizer.pad_token = tokenizer.unk_token, or "pad_token" in tokenizer_config.json.'
    )


def _string(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} holds {'null' if row[column] is None else type(row[column]).__name__}, not a string.")
    return row[column]
