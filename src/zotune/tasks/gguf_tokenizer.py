"""The tokenizer in a GGUF file, as a Hugging Face object that gives the token ids of llama.cpp: :func:`gguf_tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from zotune.tasks.gguf_splits import DEFAULT, SPLITS

if TYPE_CHECKING:
    from zotune.engines.gguf.file import GGUFFile

INSTEAD = "give the folder of the original checkpoint's tokenizer by --tokenizer_name"

#: Tokens that llama.cpp takes for control tokens whatever the file says of them.
# fmt: off
CONTROL_NAMES = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
        "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
        "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>",
        "▁<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
        "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    )
)
# fmt: on

_TYPES = {str: "texts", int: "whole numbers", float: "numbers"}

#: Most characters of a token of which all halves are looked up.
LONGEST_TOKEN = 1000

#: Ids that a file of this kind need not name.
_DEFAULTS: dict[str, dict[str, int]] = {"gpt2": {}, "gemma4": {}, "llama": {"unknown": 0, "bos": 1, "eos": 2}}


class Kind(IntEnum):
    """What a token is, as files number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def gguf_tokenizer(file: GGUFFile) -> Any:
    """The tokenizer of a GGUF file, a ``PreTrainedTokenizerFast``, with its special tokens and chat template.

    Ids are those of llama.cpp, which inference with the model uses: text is not normalized (as Qwen's original tokenizer does), and special
    tokens before and after a text are those of the file.

    Args:
        file: with ``tokenizer.ggml.model`` ``gpt2`` (byte-level BPE of a known ``tokenizer.ggml.pre``), ``llama`` (SentencePiece's BPE
            with bytes) or ``gemma4``.

    Raises:
        ValueError: another kind of tokenizer, or damaged data of it.
    """
    from transformers import PreTrainedTokenizerFast

    model = _text(file, "tokenizer.ggml.model")
    if model not in _DEFAULTS:
        raise ValueError(f"{file.path} has a tokenizer of the kind {_short(model)}, and {', '.join(_DEFAULTS)} are known: {INSTEAD}.")
    tokens = tokens_of(file)
    kinds = _kinds(file, len(tokens))
    try:
        backend, add_bos = {"gpt2": _byte_level, "gemma4": _gemma4, "llama": _sentencepiece}[model](file, tokens)
    except ValueError:
        raise
    except Exception as error:  # of the tokenizers library: a merge of unknown tokens
        raise _damaged(file, f"its tokenizer cannot be built ({' '.join(str(error).split())[:200]})") from None
    _add_special(file, backend, tokens, kinds)
    special = _special(file, model, tokens)
    add = {
        "add_bos_token": _flag(file, "tokenizer.ggml.add_bos_token", add_bos) or model == "gemma4",  # llama.cpp adds it always
        "add_eos_token": _flag(file, "tokenizer.ggml.add_eos_token", False),
    }
    for key, wanted in add.items():
        name = key.removeprefix("add_")
        if wanted and name not in special:
            raise _damaged(file, f"its texts have to begin or end with a {name} that it does not name")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.context_length,
        clean_up_tokenization_spaces=False,
        **special,
        **add,
    )
    tokenizer.name_or_path = str(file.path)  # given above, transformers would look for it on the hub
    tokenizer.chat_template = _chat_template(file)
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Any, bool]:
    """Byte-level BPE, and whether it adds bos by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = _text(file, "tokenizer.ggml.pre") if "tokenizer.ggml.pre" in file.metadata else DEFAULT
    if name not in SPLITS:
        raise ValueError(f"{file.path} has a tokenizer that splits text in the way {_short(name)}, which is not known: {INSTEAD}.")
    splits = SPLITS[name]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_named_merges(file), ignore_merges=splits.whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, splits.add_bos


def _gemma4(file: GGUFFile, tokens: list[str]) -> tuple[Any, bool]:
    """BPE of letters with bytes for what has no token, and merges by name."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = _with_bytes(file, tokens)
    unknown = _id(file, "unknown", None, len(tokens))
    name = None if unknown is None else tokens[unknown]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_named_merges(file), unk_token=name, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend, True


def _named_merges(file: GGUFFile) -> list[tuple[str, str]]:
    merges = []
    for merge in _list(file, "tokenizer.ggml.merges", str):
        place = merge.find(" ", 1)
        if place < 0:
            raise _damaged(file, f"its merge {_short(merge)} is not of two tokens")
        merges.append((merge[:place], merge[place + 1 :]))
    return merges


def _with_bytes(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    """Tokens by name, those of all bytes among them."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    missing = next((f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary), None)
    if missing is not None:
        raise ValueError(f"{file.path} has a tokenizer without tokens for all bytes ({missing} is missing): {INSTEAD}.")
    return vocabulary


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tuple[Any, bool]:
    """SentencePiece's BPE with bytes for what has no token; merges follow from the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _with_bytes(file, tokens)
    longest = max(tokens, key=len)
    if len(longest) > LONGEST_TOKEN:
        raise _damaged(file, f"its token {_short(longest)} has {len(longest)} characters")
    scores = _list(file, "tokenizer.ggml.scores", float, len(tokens))
    unknown = tokens[_id(file, "unknown", 0, len(tokens)) or 0]
    bpe = models.BPE(vocab=vocabulary, merges=_merges(tokens, scores), unk_token=unknown, byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(bpe)
    prefix = _flag(file, "tokenizer.ggml.add_space_prefix", True)
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend, True


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token together, the best score of the joint token first."""
    known, merges = set(tokens), []
    for number in sorted(range(len(tokens)), key=lambda number: -scores[number]):
        token = tokens[number]
        for place in range(len(token) - 1, 0, -1):  # of one token's halves the longest first, as it grows from the left
            if (left := token[:place]) in known and (right := token[place:]) in known:
                merges.append((left, right))
    return merges


def _add_special(file: GGUFFile, backend: Any, tokens: list[str], kinds: Sequence[int]) -> None:
    """Have control, unknown and user-defined tokens found in a text before it is split."""
    from tokenizers import AddedToken

    name = (file.name or "").lower()
    strip = "phi-3" in name or "phi3" in name  # as llama.cpp knows them
    plain = {"</s>"} if "<|tool_response>" in tokens else set()  # Gemma 4's, which has another end
    control: list[AddedToken] = []
    user: list[AddedToken] = []
    for token, kind in zip(tokens, kinds, strict=True):
        if token in plain:
            continue
        special = kind in (Kind.CONTROL, Kind.UNKNOWN) or token in CONTROL_NAMES
        if special or kind == Kind.USER_DEFINED:
            right = strip and token not in ("<unk>", "<s>", "<|endoftext|>")
            (control if special else user).append(AddedToken(token, normalized=False, special=special, rstrip=right))
    backend.add_special_tokens(control)
    backend.add_tokens(user)


def _special(file: GGUFFile, model: str, tokens: list[str]) -> dict[str, str]:
    """The special tokens that the file names, as arguments of a tokenizer."""
    found = {}
    for key, argument in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        number = _id(file, key, _DEFAULTS[model].get(key), len(tokens))
        if number is not None:
            found[argument] = tokens[number]
    return found


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """The chat template, or all of them by name."""
    key = "tokenizer.chat_template"
    default = _text(file, key) if key in file.metadata else None
    names = _list(file, "tokenizer.chat_templates", str) if "tokenizer.chat_templates" in file.metadata else []
    templates = {} if default is None else {"default": default}
    templates |= {name: _text(file, f"{key}.{name}") for name in names if name != "default" and f"{key}.{name}" in file.metadata}
    return templates if len(templates) > 1 or (templates and default is None) else default


# -- values of the metadata -----------------------------------------------------------------------------------------------------------


def tokens_of(file: GGUFFile) -> list[str]:
    """The text of each token, as llama.cpp reads it; ValueError for two of the same text, on which llama.cpp ends the process."""
    texts = (text.partition("\0")[0] for text in _list(file, "tokenizer.ggml.tokens", str))
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise ValueError(f"{file.path} is damaged: its token {_short(twice)} is there twice; download it again.")
    return tokens


def _kinds(file: GGUFFile, count: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in file.metadata:
        return [Kind.NORMAL] * count
    return _list(file, "tokenizer.ggml.token_type", int, count)


def _list(file: GGUFFile, key: str, kind: type, count: int | None = None) -> list[Any]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):  # all of a file's array have one type
        raise _damaged(file, f"{key} is {'missing' if values is None else f'no list of {_TYPES[kind]}'}")
    if count is not None and len(values) < count:
        raise _damaged(file, f"{key} has {len(values)} entries for {count} tokens")
    return values[:count]


def _text(file: GGUFFile, key: str) -> str:
    value = file.metadata.get(key)
    if not isinstance(value, str):
        raise _damaged(file, f"{key} is {'missing' if value is None else 'no text'}")
    return value


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    value = file.metadata.get(key, default)
    if not isinstance(value, bool):
        raise _damaged(file, f"{key} is {_short(str(value))}, neither true nor false")
    return value


def _id(file: GGUFFile, name: str, default: int | None, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key, default)
    if value is not None and (not isinstance(value, int) or not 0 <= value < count):
        raise _damaged(file, f"{key} is {_short(str(value))}, none of its {count} tokens")
    return value


def _damaged(file: GGUFFile, what: str) -> ValueError:
    return ValueError(f"the tokenizer in {file.path} is damaged ({what}): {INSTEAD}.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
