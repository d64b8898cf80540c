r"""How a byte-level BPE of a GGUF file splits text before its merges, by the file's ``tokenizer.ggml.pre``.

The patterns accept what llama.cpp's accept (``llama-vocab.cpp``), which differ from those of some original tokenizers beyond ASCII: its
"upper case" of Tekken and GPT-4o is any letter but ``a`` to ``z``.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _cased(number: str, after: str = "") -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{after}|{start}{_UPPER}+{_LOWER}*{after}"
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


_GPT4O = _cased(r"\p{N}{1,3}", f"(?:{_CONTRACTION})?")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS,
)


@dataclass(frozen=True)
class Splits:
    """One kind of splitting.

    Attributes:
        patterns: applied one after the other; each isolates its matches in the pieces of those before it.
        whole_words: a piece that is a token is that token, whatever the merges make of it.
        add_bos: a text begins with the token of a beginning, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


#: What the file does not name (old files).
DEFAULT = "default"

_KINDS = (
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling", Splits((_GPT2,))),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Splits((r"\p{N}", _GPT2))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", Splits((_LLAMA3,), whole_words=True, add_bos=True)),
    ("glm4 glm5", Splits((_LLAMA3,), whole_words=True)),
    ("dbrx smaug-bpe chatglm-bpe", Splits((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", Splits((_QWEN2,))),
    ("qwen35", Splits((_QWEN35,))),
    ("tekken", Splits((_cased(r"\p{N}"),), whole_words=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Splits((_GPT4O,))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Splits(_DEEPSEEK3)),
    ("deepseek-coder", Splits((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+", r"\p{N}"))),
    ("falcon", Splits((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (DEFAULT, Splits((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        Splits((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    ("seed-coder", Splits((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",))),
    ("minicpm5", Splits((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SIGNS}|{_BLANKS}"), whole_words=True)),
    ("ufakzeka", Splits((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}",))),
)

#: The kinds that are known, by name.
SPLITS: dict[str, Splits] = {name: splits for names, splits in _KINDS for name in names.split()}
