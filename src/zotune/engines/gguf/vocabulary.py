"""A tokenizer of transformers as llama.cpp has it: the tokens, how text is cut before merging, which tokens begin and end a text.

Two kinds are converted: byte-level BPE ("gpt2" in llama.cpp) whose pre-tokenizer is one of :data:`PRE_TOKENIZERS`, and BPE over
SentencePiece's pieces with bytes to fall back on ("llama"). llama.cpp normalizes no text, so that of a tokenizer with NFC (Qwen's)
must be in NFC already.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from zotune.engines.gguf.checkpoint import ELSEWHERE
from zotune.io.text import shortened

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _GPT2 = ("ByteLevel", False, False), ("ByteLevel", False, True)
#: How a tokenizer cuts text (:func:`_steps`), and whether it takes a whole word that is a token before merging -> llama.cpp's name of that.
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST, "Isolated", False), _BYTES), True): "llama-bpe",
    ((("Split", _WORDS + r"\p{N}{1,3}" + _REST, "Isolated", False), _BYTES), False): "smaug-bpe",
    ((("Split", _WORDS + r"\p{N}" + _REST, "Isolated", False), _BYTES), False): "qwen2",
}
_SPACE = "\u2581"
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    special: dict[str, int] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint's folder.

    Args:
        size: rows of the embedding; tokens are filled up to it.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or it is not known here that it cuts text in the same way.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare ones
        raise ValueError(f"the tokenizer of {folder} cannot be read ({shortened(str(error), 200)}): download it again.") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"the tokenizer of {folder} is not one of the package tokenizers (tokenizer.json); {ELSEWHERE}.")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if model.get("type") != "BPE" or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(f"the tokenizer of {folder} is no plain BPE ({model.get('type')}); {ELSEWHERE}.")
    added = {token["id"]: token for token in definition["added_tokens"]}
    odd = next((token["content"] for token in added.values() if token["lstrip"] or token["rstrip"] or token["single_word"]), None)
    if odd is not None:
        raise ValueError(
            f"the tokenizer of {folder} takes spaces or word borders around {odd!r} with it, which llama.cpp does not; {ELSEWHERE}."
        )
    tokens, types = _tokens(folder, model, added, size)
    if model.get("byte_fallback"):
        vocabulary = _sentence_pieces(folder, definition, tokens, types)
    else:
        vocabulary = Vocabulary(
            "gpt2", _pre_tokenizer(folder, definition), tokens, types, merges=[" ".join(pair) for pair in _merges(model)]
        )
    vocabulary.special = {
        kind: number for kind in ("bos", "eos", "unk", "sep", "pad") if (number := getattr(tokenizer, f"{kind}_token_id", None)) is not None
    }
    vocabulary.add_bos, vocabulary.add_eos = _added_around(folder, tokenizer)
    template = tokenizer.chat_template
    vocabulary.chat_template = (
        [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else template
    )
    return vocabulary


def _tokens(folder: Path, model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by number; numbers without a token are filled."""
    by_number = {number: token for token, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
    if max(by_number) >= size:
        raise ValueError(f"the tokenizer of {folder} has the token number {max(by_number)}, and the model {size} rows of its embedding.")
    kinds = gguf.TokenType
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    types = [kinds.NORMAL if number in by_number else kinds.UNUSED for number in range(size)]
    for number, token in added.items():
        types[number] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"the tokenizer of {folder} has a token twice, which llama.cpp does not take; {ELSEWHERE}.")
    return tokens, [int(kind) for kind in types]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]  # type: ignore[misc]


def _steps(definition: Mapping[str, Any] | None) -> list[Any]:
    """A pre-tokenizer as a list of its steps, each reduced to what decides how text is cut."""
    kind = (definition or {}).get("type")
    if definition is None:
        return []
    if kind == "Sequence":
        return [step for each in definition["pretokenizers"] for step in _steps(each)]
    if kind == "ByteLevel":
        return [("ByteLevel", definition["add_prefix_space"], definition.get("use_regex", True))]
    if kind == "Digits":
        return [("Digits", definition["individual_digits"])]
    if kind == "Split":
        return [("Split", definition["pattern"].get("Regex"), definition["behavior"], definition["invert"])]
    return [(kind, json.dumps(definition, sort_keys=True))]


def _pre_tokenizer(folder: Path, definition: Mapping[str, Any]) -> str:
    steps = tuple(_steps(definition["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get((steps, bool(definition["model"].get("ignore_merges"))))
    if name is None:
        raise ValueError(f"the tokenizer of {folder} cuts text in a way that is not known to be one of llama.cpp's ({steps}); {ELSEWHERE}.")
    normalizer = definition["normalizer"]
    if normalizer is not None and not (name == "qwen2" and normalizer["type"] == "NFC"):
        raise ValueError(f"the tokenizer of {folder} normalizes text ({normalizer['type']}), which llama.cpp does not; {ELSEWHERE}.")
    return name


def _sentence_pieces(folder: Path, definition: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """A tokenizer of SentencePiece's pieces.

    llama.cpp merges any two neighbors that make a token, that of the highest score first; transformers merges by a list of pairs.
    They agree where the list holds every such pair, and all pairs of one token follow each other.
    """
    model, kinds = definition["model"], gguf.TokenType
    space_prefix = _space_prefix(definition)
    missing = _BYTE_TOKENS - set(model["vocab"])
    if space_prefix is None or missing or model.get("ignore_merges"):
        what = f"it lacks the byte {min(missing)}" if missing else "another normalizer or pre-tokenizer than SentencePiece's"
        raise ValueError(f"the tokenizer of {folder} is not known to be one of llama.cpp's ({what}); {ELSEWHERE}.")
    ranks: dict[str, list[int]] = {}
    pairs = _merges(model)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, []).append(rank)
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == kinds.NORMAL and token not in _BYTE_TOKENS]
    known, listed = set(model["vocab"]), set(pairs)
    for token in normal:
        if any((split := (token[:at], token[at:])) not in listed and known.issuperset(split) for at in range(1, len(token))):
            raise ValueError(f"the tokenizer of {folder} never merges parts of {token!r} that llama.cpp would merge; {ELSEWHERE}.")
    order = sorted(ranks, key=lambda token: ranks[token][0])
    if any(ranks[before][-1] > ranks[after][0] for before, after in itertools.pairwise(order)):
        raise ValueError(f"the tokenizer of {folder} merges in an order that llama.cpp cannot follow; {ELSEWHERE}.")
    scores = {token: -float(place) for place, token in enumerate(order)}
    unknown = model.get("unk_token")
    for number, token in enumerate(tokens):
        if token in _BYTE_TOKENS:
            types[number] = int(kinds.BYTE)
        elif token == unknown:
            types[number] = int(kinds.UNKNOWN)
    numbers = [scores.get(token, -float(len(order)) if kind == kinds.NORMAL else 0.0) for token, kind in zip(tokens, types, strict=True)]
    return Vocabulary("llama", "default", tokens, types, scores=numbers, add_space_prefix=space_prefix)


def _space_prefix(definition: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None where spaces are treated in another way than SentencePiece does."""
    normalizer, before = definition["normalizer"], definition["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer] if normalizer else []
    prepend, replace = {"type": "Prepend", "prepend": _SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if before is None:
        return True if steps == [prepend, replace] else False if steps == [replace] else None
    if steps or before["type"] != "Metaspace" or before["replacement"] != _SPACE or before.get("split", True):
        return None
    return before.get("prepend_scheme", "always") != "never"


def _added_around(folder: Path, tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts a token before, and one behind a text."""
    plain, whole = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if [bos] * before + plain + [eos] * after == whole:
            return before, after
    raise ValueError(f"the tokenizer of {folder} puts other tokens around a text than one that begins and one that ends it; {ELSEWHERE}.")
