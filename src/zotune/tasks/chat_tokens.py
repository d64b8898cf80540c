"""Chats as tokens, those of `apply_chat_template(tokenize=True)`, with a mask of the tokens that are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from zotune.tasks.chat import Chat, ChatOptions, chat_of
from zotune.tasks.chat_template import ChatTemplate, scored_characters

#: Called with a fact on a row, which is reported once for all rows; {rows} stands for how many.
Note = Callable[[str], None]

CUT = "{rows} are cut to the length limit (--truncate)."
LEFT_OUT = (
    "{rows} with earlier messages of the assistant that the chat template rewrites (it drops their reasoning, say); these messages are "
    "not trained on."
)
UNCHECKED = (
    "{rows} whose text the tokenizer changes, so that it was not checked which tokens are the assistant's; the tokenizer's offsets say it."
)


class TokenizedChat(NamedTuple):
    """Token ids of a chat, the mask of those trained on, and the characters of each, or None where the tokenizer gives none."""

    ids: list[int]
    mask: list[bool]
    offsets: list[tuple[int, int]] | None


class ChatTokens:
    """Tokenizes the chats of rows.

    Args:
        tokenizer: with a chat template.
        options: tools and template variables for rows without their own.
        note: called with facts to report.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions | None, note: Note) -> None:
        self.tokenizer, self.options, self.note = tokenizer, options, note
        self.template = ChatTemplate(tokenizer)
        self._checked = False
        self._seen: set[str] = set()

    def close(self) -> None:
        """Ends the child process of the template."""
        self.template.close()

    def of_row(self, row: Mapping[str, Any], limit: int | None) -> TokenizedChat:
        """The chat of a row in at most ``limit`` tokens, where that is possible: its oldest turns are cut, then the beginnings of contents.

        Raises:
            ValueError: a malformed row; a template that refuses it; no way to find the assistant's tokens.
        """
        chat = self.template.with_arguments(chat_of(row, self.options))
        self._note_unread(chat)
        tokens = self.tokens(chat)
        if limit is None or len(tokens.ids) <= limit:
            return tokens
        self.note(CUT)
        while len(tokens.ids) > limit and (oldest := _oldest_turn(chat)):
            chat = chat.without(oldest)
            tokens = self.tokens(chat)
        return tokens if len(tokens.ids) <= limit else self._shortened(chat, tokens, limit)

    def tokens(self, chat: Chat) -> TokenizedChat:
        """The tokens of a chat; those that overlap the trained characters are trained on."""
        text, marks, left_out = scored_characters(self.template, chat)
        if left_out:
            self.note(LEFT_OUT)
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False)
        ids = list(encoded["input_ids"])
        self._check_ids(chat, ids)
        if not fast:
            return TokenizedChat(ids, self._by_prefixes(text, marks, ids), None)
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        mask = _overlapping(offsets, marks)
        self._check_mask(text, marks, ids, mask)
        return TokenizedChat(ids, mask, offsets)

    def _check_ids(self, chat: Chat, ids: list[int]) -> None:
        """The first chat, and all of a tokenizer with its own way, must be the tokens of `apply_chat_template`."""
        own_way = "apply_chat_template" in vars(type(self.tokenizer))
        if self._checked and not own_way:
            return
        expected = self.tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=True, return_dict=True, **chat.variables)
        if list(expected["input_ids"]) != ids:
            raise ValueError(
                f"{type(self.tokenizer).__name__} tokenizes a chat in a way of its own, so it cannot be found which tokens are the "
                "assistant's: use a tokenizer that tokenizes the template's text."
            )
        self._checked = True

    def _check_mask(self, text: str, marks: bytearray, ids: list[int], mask: list[bool]) -> None:
        """The tokens that are trained on must decode to the marked text; whitespace does not count."""
        decode = self.tokenizer.decode
        if _bare(decode(ids)) != _bare(text):
            self.note(UNCHECKED)
            return
        found = [_bare(decode([ids[i] for i in range(*run)])) for run in _runs(mask)]
        wanted = [bare for start, end in _runs(marks) if (bare := _bare(text[start:end]))]
        if not all(any(bare in each for each in found) for bare in wanted):
            raise ValueError(
                "the offsets of the tokenizer disagree with its tokens, so it cannot be found which tokens are the assistant's: "
                "use another version of the tokenizer."
            )

    def _by_prefixes(self, text: str, marks: bytearray, ids: list[int]) -> list[bool]:
        """The mask without offsets: a stretch of the text begins after the tokens of the text before it."""
        mask = [False] * len(ids)
        for start, end in _runs(marks):
            places = []
            for place in (start, end):
                before = self.tokenizer(text[:place], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
                if list(before) != ids[: len(before)]:
                    raise ValueError(
                        f"{type(self.tokenizer).__name__} gives no offsets, and tokens join the assistant's text to other text, so it "
                        "cannot be found which tokens are the assistant's: use the fast version of the tokenizer."
                    )
                places.append(len(before))
            mask[places[0] : places[1]] = [True] * (places[1] - places[0])
        return mask

    def _shortened(self, chat: Chat, tokens: TokenizedChat, limit: int) -> TokenizedChat:
        """The last turn without the beginnings of the contents that are not the assistant's, the system's last; else all of it."""
        excess, gone = len(tokens.ids) - limit, set[int]()
        if tokens.offsets is not None:
            text = self.template.text(chat)
            others = [
                i for i, m in enumerate(chat.messages) if m["role"] != "assistant" and isinstance(m.get("content"), str) and m["content"]
            ]
            for index in sorted(others, key=lambda i: (_is_system(chat.messages[i]), i)):
                try:
                    start, end, _ = self.template.content(chat, index, text)
                except ValueError:
                    continue
                inside = [
                    place for place, (first, after) in enumerate(tokens.offsets) if start <= first < after <= end and not tokens.mask[place]
                ]
                gone.update(inside[: excess - len(gone)])
        kept = [place for place in range(len(tokens.ids)) if place not in gone]
        return TokenizedChat([tokens.ids[place] for place in kept], [tokens.mask[place] for place in kept], None)

    def _note_unread(self, chat: Chat) -> None:
        """Reports what a row gives and the template does not read, once for each name."""
        given = {"tools": "tools"} if chat.tools else {}
        given |= {name: f"chat_template_kwargs {name!r}" for name in chat.variables if name != "documents"}
        given |= {key: f"the key {key!r} of messages" for message in chat.messages for key in message if message[key] is not None}
        for name in given.keys() - self._seen - {"role", "content"}:
            read = self.template.reads(chat, name)
            if name == "tool_calls" and not read:
                place = next(place for place, message in enumerate(chat.messages, 1) if message.get("tool_calls"))
                raise ValueError(
                    f"the chat template writes no tool calls (it does not read 'tool_calls'), so message {place} cannot be rendered: use a "
                    "tokenizer whose template has them, or write the calls as content."
                )
            self._seen.add(name)
            if not read:
                self.note(f"the chat template does not read {given[name]}, which has no effect.")


def _overlapping(offsets: list[tuple[int, int]], marks: bytearray) -> list[bool]:
    """Whether each token's characters are marked; one without characters (a mark of a word's start, a blank) by where it stands."""
    mask, done = [], 0
    for start, end in offsets:
        first = start if start < end else min(done, start)
        where = marks[first:end] if first < end else marks[end : end + 1]
        mask.append(1 in where)
        done = max(done, end)
    return mask


def _oldest_turn(chat: Chat) -> set[int]:
    """The messages after the system's up to the next user's; none where that is all."""
    first = next((i for i, message in enumerate(chat.messages) if not _is_system(message)), len(chat.messages))
    end = next((i for i in range(first + 1, len(chat.messages)) if chat.messages[i]["role"] == "user"), None)
    return set() if end is None else set(range(first, end))


def _is_system(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def _runs(marks: bytearray | list[bool]) -> list[tuple[int, int]]:
    """The stretches of what is marked: (start, end)."""
    return [match.span() for match in re.finditer(b"\1+", bytes(marks))]


def _bare(text: str) -> str:
    return "".join(text.split())
