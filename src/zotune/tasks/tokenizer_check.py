"""Whether a tokenizer reads text as llama.cpp does with the vocabulary of its model: :func:`check_tokenizer`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from zotune.tasks.gguf_tokenizer import CONTROL_NAMES, INSTEAD

if TYPE_CHECKING:
    from zotune.engines.gguf.file import GGUFFile

#: Most texts that are compared, and most characters of each. llama.cpp's patterns recurse, some once for each character.
TEXTS, CHARACTERS = 256, 1000
#: Ids whose text is compared, spread over the vocabulary.
IDS = 64
#: Tokens of a difference that a message shows.
SHOWN = 6

#: Texts that tokenizers read differently, in the normal form C.
PAGE = (
    "The film isn't what they'd said: I'm sure we've all seen WORSE, haven't we? IT'S 'so-so', she'll say.",
    " one leading blank,  two inside,   three and a trailing one ",
    "line\nline\r\n\n  \n\tafter a tab\t\t\n   three blanks\n\n\nend\n",
    "7 42 123 4567 89012 3.14159 1,000,000 -273.15 2024-11-28 ½ Ⅳ ٣٤٥",
    'def f(x: int) -> str:\n    return {"a": [1, 2], **x}  # why?\n\n\nif __name__ == "__main__":\n\tprint(f(0x1F) != 1e-5)\n',
    "Größe naïve façade Ærø İstanbul ΑΒΓ αβγ Привет, МИР! שלום مرحبا नमस्ते สวัสดี",
    "東京は日本の首都です。中文字符，測試１２３ 한국어 텍스트",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ ∑∫√ → € “quoted” — … \u00a0\u2003\u200b\ufeff.",
    "http://example.org/a_b?c=d&e=%20#f C:\\dir\\file.txt $x^2$ <b>bold</b> a|b ~/~ @user snake_case camelCase HTMLParser",
    "aaaaaaaaaaaaaaaa ================ ---------------- ................ ________ !!!!!!",
    "",
)

_BYTE = re.compile("<0x[0-9A-F]{2}>")

logger = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """What is asked of the engine: llama.cpp's library, its vocabulary, the number of tokens, and the file of them."""

    lib: Any
    vocab: Any
    vocabulary: int
    file: GGUFFile


def check_tokenizer(tokenizer: Any, engine: Vocabulary, texts: Iterable[str] = ()) -> None:
    """Check that a tokenizer gives the ids that llama.cpp gives, on a fixed page and on given texts, special tokens in them included.

    Special tokens before and after a text become those of the file's metadata, which inference uses; the tokenizer is changed for that.

    Args:
        tokenizer: of the file, or given for it.
        engine: llama.cpp with the model.
        texts: of the data, of which the first 256 are compared, 1000 characters of each.

    Raises:
        ValueError: another vocabulary; a text that is read otherwise, which the message names with both readings; another end of text.
    """
    _check_tokens(tokenizer, engine)
    special = [f"a{token}b {token}\n {token}{token} c" for token in _special_tokens(tokenizer)[:IDS]]
    given = [text[:CHARACTERS].encode(errors="ignore").decode() for text in islice(texts, TEXTS)]
    page = [*PAGE, *special, *given]
    encoded = tokenizer(page, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    for text, ids in zip(page, encoded, strict=True):
        expected = llama_ids(engine, text)
        if list(ids) != expected:
            raise ValueError(_difference(tokenizer, engine, text, list(ids), expected))
    _match_ends(tokenizer, engine)


def llama_ids(engine: Vocabulary, text: str) -> list[int]:
    """Token ids by llama.cpp, special tokens in the text parsed and none added."""
    lib, content = engine.lib, text.encode()
    room = len(content) + 8
    while True:
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(engine.vocab, content, len(content), tokens, room, False, True)
        if count >= 0:
            return list(tokens[:count])
        room = -count


def _check_tokens(tokenizer: Any, engine: Vocabulary) -> None:
    count, rows = len(tokenizer), engine.vocabulary
    if count > rows:
        raise ValueError(
            f"the vocabulary of {engine.file.path} does not match the given tokenizer: it has {rows} tokens and the tokenizer {count}; "
            f"{_fix(tokenizer, engine)}."
        )
    numbers = sorted({*range(0, count, max(1, count // IDS)), *(tokenizer.all_special_ids or ())})
    names = list(zip(numbers, tokenizer.convert_ids_to_tokens(numbers), strict=True))
    if engine.file.metadata.get("tokenizer.ggml.model") == "llama":  # where one is missing, llama.cpp may end the process
        names += [(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>"), f"<0x{byte:02X}>") for byte in range(256)]
    for number, name in names:
        text = _text_of(engine, number)
        if isinstance(name, str) and name.replace("▁", " ") != text.replace("▁", " "):  # converters write blanks of some tokens
            raise ValueError(
                f"the vocabulary of {engine.file.path} does not match the given tokenizer: token {number} is {text!r} in the file and "
                f"{name!r} in the tokenizer; {_fix(tokenizer, engine)}."
            )


def _match_ends(tokenizer: Any, engine: Vocabulary) -> None:
    """Have the tokenizer add what llama.cpp adds before and after a text."""
    lib, vocab = engine.lib, engine.vocab
    before = [lib.llama_vocab_bos(vocab)] if lib.llama_vocab_get_add_bos(vocab) else []
    after = [lib.llama_vocab_eos(vocab)] if lib.llama_vocab_get_add_eos(vocab) else []
    wanted = [*before, *llama_ids(engine, "a"), *after]

    def found() -> list[int]:
        return list(tokenizer("a", return_attention_mask=False, verbose=False)["input_ids"])

    if found() != wanted:
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(before), bool(after)
        if found() != wanted:
            raise ValueError(
                f"the tokenizer reads 'a' with its special tokens as {found()} and llama.cpp as {wanted}: {_fix(tokenizer, engine)}."
            )
        logger.info("special tokens are added to a text as %s says: %s.", engine.file.path, _named(engine, before, after))
    end = tokenizer.eos_token_id
    if end is not None and not lib.llama_vocab_is_eog(vocab, end):
        raise ValueError(
            f"the tokenizer ends a text with {tokenizer.eos_token!r} ({end}), at which llama.cpp does not stop: {_fix(tokenizer, engine)}."
        )


def _named(engine: Vocabulary, before: Sequence[int], after: Sequence[int]) -> str:
    return f"{''.join(_text_of(engine, each) for each in before)}text{''.join(_text_of(engine, each) for each in after)}"


def _special_tokens(tokenizer: Any) -> list[str]:
    """Those that may stand in a text: of the tokenizer by name, of llama.cpp by name, then the others; not those of single bytes."""
    known = [name for name in sorted(CONTROL_NAMES) if tokenizer.convert_tokens_to_ids(name) not in (None, tokenizer.unk_token_id)]
    found = [*tokenizer.all_special_tokens[: IDS // 2], *known, *tokenizer.get_added_vocab()]
    return [token for token in dict.fromkeys(map(str, found)) if _BYTE.fullmatch(token) is None]


def _difference(tokenizer: Any, engine: Vocabulary, text: str, ids: Sequence[int], expected: Sequence[int]) -> str:
    same = next((i for i, (one, other) in enumerate(zip(ids, expected, strict=False)) if one != other), min(len(ids), len(expected)))
    readings = [", ".join(f"{_text_of(engine, each)!r} ({each})" for each in them[same : same + SHOWN]) for them in (ids, expected)]
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    return (
        f"the tokenizer and llama.cpp read {shown!r} differently from token {same + 1} on, as {readings[0] or 'nothing'} and as "
        f"{readings[1] or 'nothing'}: {_fix(tokenizer, engine)}."
    )


def _text_of(engine: Vocabulary, number: int | None) -> str:
    if number is None or not 0 <= number < engine.vocabulary:
        return "no token"
    return engine.lib.llama_vocab_get_text(engine.vocab, number).decode(errors="replace")


def _fix(tokenizer: Any, engine: Vocabulary) -> str:
    if getattr(tokenizer, "name_or_path", None) == str(engine.file.path):
        return INSTEAD
    return "leave out --tokenizer_name to take the tokenizer in the file, or give that of the checkpoint that the file was made from"
