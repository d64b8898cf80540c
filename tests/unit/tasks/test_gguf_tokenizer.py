"""The tokenizer of a GGUF file: ids are those of llama.cpp, masks of chats those of the original tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from chat_tokenizers import chat_tokenizer
from gguf_files import VocabularyOnly, write_tokenizer, write_vocabulary
from zotune import bundled
from zotune.engines.gguf.file import GGUFFile
from zotune.tasks.chat import ChatOptions
from zotune.tasks.encoding import Encoder
from zotune.tasks.gguf_splits import SPLITS
from zotune.tasks.gguf_tokenizer import gguf_tokenizer
from zotune.tasks.sources import Rows
from zotune.tasks.tokenizer_check import PAGE, check_tokenizer, llama_ids

Open = Callable[..., VocabularyOnly]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT = [
    {"role": "user", "content": "was it  good?"},
    {"role": "assistant", "content": "it was. \U0001f600\nso"},
    {"role": "user", "content": "and the end?"},
    {"role": "assistant", "content": "less so."},
]
LETTERS = (
    " \t\n\r'strevdmlSTMDREL0129٣½Ⅳ.,!?-_/\\|^~$+=<>`#@([{\"…。"
    "«éÉßΑβЖжĳǅªºÅ中字日の한กा्́\u0301\u200b\ufeff\u00a0\u2003\u2028\u0085\U0001f600👍🏽€ſK"
)
TEXT = st.lists(st.sampled_from([*LETTERS, "'s", "'LL", "   ", "\r\n", "1234", "aB", "ABc", "Aé", "ÉA"]), max_size=40).map("".join)
#: One name of each kind of splitting.
KINDS = sorted({splits: name for name, splits in SPLITS.items()}.values())


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the vocabulary of a Hugging Face tokenizer in llama.cpp, written as GGUF."""
    found: list[VocabularyOnly] = []

    def open_(tokenizer: Any, **options: Any) -> VocabularyOnly:
        found.append(VocabularyOnly(write_tokenizer(tmp_path / f"{len(found)}.gguf", tokenizer, **options)))
        return found[-1]

    yield open_
    for each in found:
        each.close()


@cache
def byte_level() -> Any:
    """Merges across all kinds of characters, so that ids show where a text is split."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = partial(trainers.BpeTrainer, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first in LETTERS for second in LETTERS]
    backend.train_from_iterator([*PAGE * 2, *pairs], trainer(vocab_size=4000, special_tokens=["<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@cache
def sentencepiece(end: str = "</s>") -> Any:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = list(dict.fromkeys(["<unk>", "<s>", "</s>", end, *BYTES]))
    trainer = trainers.BpeTrainer(vocab_size=2000, limit_alphabet=100, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*PAGE * 2, "aaaa aa a aaa   aaa    aa"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, unk_token="<unk>")


def bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# -- ids ----------------------------------------------------------------------------------------------------------------------------------


def test_bundled_models_ids_are_the_originals_and_llama_cpps(opened: Open) -> None:
    original = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    engine = opened(original, ggml__add_bos_token=True)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)
    check_tokenizer(original, engine)
    for text in PAGE:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"] == [1, *llama_ids(engine, text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(tokenizer, name) for name in names] == [getattr(original, name) for name in names] == [1, 2, 0]
    assert len(tokenizer) == len(original) and tokenizer.model_max_length == 128


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_ids_are_llama_cpps(kind: str, opened: Open) -> None:
    engine = opened(byte_level(), pre=kind)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(TEXT)
    def equal(text: str) -> None:
        assert bare(tokenizer, text) == llama_ids(engine, text)

    equal()


def test_a_file_without_a_kind_of_splitting_has_llama_cpps(opened: Open) -> None:
    engine = opened(byte_level(), pre=None)
    check_tokenizer(gguf_tokenizer(engine.file), engine)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_llama_cpps(prefix: bool, opened: Open) -> None:
    engine = opened(sentencepiece(), ggml__add_space_prefix=prefix)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)
    assert tokenizer.decode(bare(tokenizer, PAGE[1])) == PAGE[1]

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(TEXT | st.text("a ▁b<s>", max_size=30) | st.text(max_size=10))
    def equal(text: str) -> None:
        assert bare(tokenizer, text) == llama_ids(engine, text)

    equal()


def test_gemma_4s_ids_are_llama_cpps(opened: Open) -> None:
    """Merges by name of SentencePiece's letters; ``</s>`` is text."""
    engine = opened(sentencepiece("<|tool_response>"), model="gemma4", ggml__unknown_token_id=0, ggml__add_bos_token=False)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(TEXT | st.text("a \n▁</s>", max_size=30) | st.text(max_size=10))
    def equal(text: str) -> None:
        assert bare(tokenizer, text) == llama_ids(engine, text)

    equal()


@pytest.mark.parametrize(("kind", "read"), [("llama3", ["abc"]), ("dbrx", ["ab", "c"])])
def test_words_that_are_tokens_are_kept_where_llama_cpp_does(kind: str, read: list[str], tmp_path: Path) -> None:
    tokens = [*pre_tokenizers.ByteLevel.alphabet(), "ab", "abc"]
    ids = {"ggml__bos_token_id": 0}
    engine = VocabularyOnly(write_vocabulary(tmp_path / "v.gguf", tokens, [1] * len(tokens), pre=kind, merges=[("a", "b")], **ids))
    tokenizer = gguf_tokenizer(engine.file)
    assert tokenizer.convert_ids_to_tokens(bare(tokenizer, "abc")) == read
    assert bare(tokenizer, "abc") == llama_ids(engine, "abc")
    engine.close()


def test_special_tokens_in_a_text_are_found_as_by_llama_cpp(opened: Open) -> None:
    original = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    original.add_tokens([AddedToken("  ", normalized=False), AddedToken("<think>", normalized=False)])
    original.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_start|>x"]})
    engine = opened(original)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)
    for text in ("<|im_start|>x<|im_start|> y</s>", "a  b   c    d", "<think>\n</think>"):
        assert bare(tokenizer, text) == llama_ids(engine, text)
    assert "<think>" not in tokenizer.all_special_tokens


def test_end_tokens_typed_as_text_are_special_all_the_same(tmp_path: Path) -> None:
    tokens = [*BYTES, *"▁ab<>s/", "<unk>", "<s>", "</s>", "<|im_end|>"]
    kinds = [6] * 256 + [1] * 7 + [2, 3, 1, 1]
    scores = [0.0] * len(tokens)
    path = write_vocabulary(
        tmp_path / "v.gguf", tokens, kinds, model="llama", scores=scores, ggml__bos_token_id=264, ggml__eos_token_id=265
    )
    engine = VocabularyOnly(path)
    tokenizer = gguf_tokenizer(engine.file)
    check_tokenizer(tokenizer, engine)
    assert bare(tokenizer, "a<|im_end|>b</s>")[-1] == 265
    engine.close()


def phi_3() -> Any:
    """With the token that llama.cpp expects of a model of this name."""
    tokenizer = copy.deepcopy(chat_tokenizer("phi3"))
    tokenizer.add_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return tokenizer


@pytest.mark.parametrize(("name", "dropped"), [("Phi-3 mini", True), ("small", False)])
def test_blanks_after_special_tokens_are_dropped_in_phi_3(name: str, dropped: bool, opened: Open) -> None:
    engine = opened(phi_3(), name=name)
    tokenizer, text = gguf_tokenizer(engine.file), "<|user|>\n was it <|end|>\n<s> good"
    check_tokenizer(tokenizer, engine)
    assert bare(tokenizer, text) == llama_ids(engine, text)
    assert (bare(tokenizer, text) == bare(tokenizer, text.replace("\n", ""))) is dropped


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (True, True), (False, True)])
def test_tokens_around_a_text_are_those_of_the_file(before: bool, after: bool, opened: Open) -> None:
    engine = opened(byte_level(), pre="llama3", ggml__add_bos_token=before, ggml__add_eos_token=after)
    given_tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    given_tokenizer.backend_tokenizer.pre_tokenizer = gguf_tokenizer(engine.file).backend_tokenizer.pre_tokenizer
    given_tokenizer.backend_tokenizer.model.ignore_merges = True
    given_tokenizer.add_bos_token, given_tokenizer.add_eos_token = not before, not after
    for tokenizer in (gguf_tokenizer(engine.file), given_tokenizer):
        check_tokenizer(tokenizer, engine)
        assert tokenizer("a")["input_ids"] == [0] * before + bare(tokenizer, "a") + [1] * after


def test_a_saved_tokenizer_gives_the_same_ids(opened: Open, tmp_path: Path) -> None:
    for original in (byte_level(), sentencepiece(), chat_tokenizer("tinyllama")):
        tokenizer = gguf_tokenizer(opened(original, ggml__add_bos_token=True).file)
        tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert [again(text)["input_ids"] for text in PAGE] == [tokenizer(text)["input_ids"] for text in PAGE]
        assert again.chat_template == tokenizer.chat_template and again.model_max_length == 128


# -- refusals -----------------------------------------------------------------------------------------------------------------------------


def written(path: Path, **changes: Any) -> GGUFFile:
    tokens = [*BYTES, "▁", "a", "b", "ab", "<unk>"]
    options: dict[str, Any] = {"model": "llama", "scores": [0.0] * len(tokens), "tokens": tokens, "kinds": [6] * 256 + [1] * 4 + [2]}
    options |= {f"ggml__{name}_token_id": number for name, number in (("bos", 256), ("eos", 257), ("unknown", 260))} | changes
    return GGUFFile(write_vocabulary(path / "v.gguf", options.pop("tokens"), options.pop("kinds"), **options))


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "no_vocab"])
def test_other_kinds_of_tokenizers_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a tokenizer of the kind '{model}', and gpt2, gemma4, llama are known.*--tokenizer_name"):
        gguf_tokenizer(written(tmp_path, model=model))


@pytest.mark.parametrize("kind", ["kimi-k2", "jina-v2-es", "new"])
def test_unknown_ways_to_split_text_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"splits text in the way '{kind}', which is not known.*--tokenizer_name"):
        gguf_tokenizer(written(tmp_path, model="gpt2", pre=kind, merges=[("a", "b")]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": [*"▁ab", *BYTES[:-1], "ab", "<unk>"]}, "<0xFF> is missing"),
        ({"tokens": [*BYTES, "▁", "a", "b", "ab" * 501, "<unk>"]}, "has 1002 characters"),
        ({"scores": ()}, "tokenizer.ggml.scores is missing"),
        ({"scores": [1.0, 2.0]}, "tokenizer.ggml.scores has 2 entries for 261 tokens"),
        ({"kinds": [1, 2]}, "token_type has 2 entries"),
        ({"ggml__eos_token_id": 261}, "eos_token_id is '261', none of its 261 tokens"),
        ({"ggml__add_bos_token": 3}, "add_bos_token is '3', neither true nor false"),
        ({"model": "gpt2", "pre": "gpt-2"}, "tokenizer.ggml.merges is missing"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": [("a", "c")]}, "cannot be built"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": [("a",)]}, "its merge 'a' is not of two tokens"),
        ({"chat_template": 5}, "tokenizer.chat_template is no text"),
    ],
)
def test_a_damaged_tokenizer_is_named_in_one_sentence(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"v\.gguf.*--tokenizer_name\.$") as error:
        gguf_tokenizer(written(tmp_path, **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("again", ["a", "a\0b"])
def test_a_token_that_is_there_twice_is_named(again: str, tmp_path: Path) -> None:
    """llama.cpp, which reads texts up to a zero, ends the process for it."""
    with pytest.raises(ValueError, match=r"v\.gguf is damaged: its token 'a' is there twice; download it again\.$"):
        gguf_tokenizer(written(tmp_path, tokens=[*BYTES, "▁", "a", "b", again, "<unk>"]))


def test_a_beginning_that_the_file_does_not_name_is_refused(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", ["a", "b", "ab"], [1] * 3, pre="llama3", merges=[("a", "b")])
    with pytest.raises(ValueError, match="begin or end with a bos_token that it does not name"):
        gguf_tokenizer(GGUFFile(path))


def test_a_tokenizer_of_another_vocabulary_is_refused(opened: Open) -> None:
    original = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    small, large = opened(byte_level()), opened(original)
    with pytest.raises(ValueError, match=r"vocabulary of .* does not match the given tokenizer: it has 4000 tokens and the tokenizer 8192"):
        check_tokenizer(original, small)
    with pytest.raises(
        ValueError, match=r"does not match the given tokenizer: token \d+ is .* in the file and .* leave out --tokenizer_name"
    ):
        check_tokenizer(byte_level(), large)


def test_a_file_without_bytes_does_not_end_the_process(opened: Open, tmp_path: Path) -> None:
    """llama.cpp ends it where it needs such a token."""
    tokens = ["<unk>", "<s>", "</s>", "a", *BYTES[:-1], "b"]
    path = write_vocabulary(tmp_path / "v.gguf", tokens, [2, 3, 3, 1] + [6] * 255 + [1], model="llama", scores=[0.0] * len(tokens))
    engine = VocabularyOnly(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[])), unk_token="<unk>"
    )
    with pytest.raises(ValueError, match=r"does not match the given tokenizer: token 0 is '<unk>' in the file and '<0xFF>'"):
        check_tokenizer(tokenizer, engine)
    engine.close()


def test_the_first_text_that_is_read_otherwise_is_named(opened: Open) -> None:
    original = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    engine = opened(original, ggml__add_bos_token=True)
    original.backend_tokenizer.normalizer = normalizers.NFC()
    check_tokenizer(original, engine, ["good", "fine"])
    with pytest.raises(
        ValueError, match=r"read 'cafe\u0301 2' differently from token 2 on, as 'af' .* and as 'afe' .*--tokenizer_name"
    ) as error:
        check_tokenizer(original, engine, ["good", "cafe\u0301 2", "e\u0301"])
    assert "\n" not in str(error.value)


def test_an_end_at_which_llama_cpp_does_not_stop_is_refused(opened: Open) -> None:
    original = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    engine = opened(original, ggml__add_bos_token=True)
    original.eos_token = "<pad>"
    with pytest.raises(ValueError, match=r"ends a text with '<pad>' \(0\), at which llama.cpp does not stop"):
        check_tokenizer(original, engine)


# -- chats --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama2", "tinyllama", "phi3", "byte-level", "generation"])
def test_chats_have_the_ids_and_masks_of_the_original(kind: str, opened: Open) -> None:
    original = phi_3() if kind == "phi3" else chat_tokenizer(kind)
    engine = opened(original, name="Phi-3" if kind == "phi3" else "small")
    tokenizer = gguf_tokenizer(engine.file)
    rows = Rows([{"messages": CHAT}, {"messages": CHAT[:2]}], "mine.jsonl", range(1, 3))
    examples = Encoder(tokenizer).completions(rows)
    assert examples == Encoder(original).completions(rows)
    for example, chat in zip(examples, (CHAT, CHAT[:2]), strict=True):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert example["prompt_ids"] + example["completion_ids"] == llama_ids(engine, text)
        check_tokenizer(tokenizer, engine, [text])


def test_named_templates_are_those_of_the_original(opened: Open) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    engine = opened(
        chat_tokenizer("byte-level"),
        chat_template="{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}",
        chat_templates=["tool_use", "gone"],
        chat_template__tool_use="{{ tools[0]['function']['name'] }}{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}",
    )
    tokenizer = gguf_tokenizer(engine.file)
    rows = Rows([{"messages": CHAT[:2]}], "mine.jsonl", range(1, 2))
    plain, with_tools = (Encoder(tokenizer, chat=options).completions(rows)[0] for options in (None, ChatOptions(tools=tools)))
    texts = [tokenizer.decode(example["prompt_ids"] + example["completion_ids"]) for example in (plain, with_tools)]
    assert texts[1] == f"weather{texts[0]}" and texts[0].startswith("user:was it")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "the tokenizer has no chat template, which the column 'messages' needs"),
        ("{% for m in messages %}{{ m }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ 'x' * 10 ** 10 }}", "the tokenizer's chat template"),
    ],
)
def test_absent_damaged_and_hostile_templates_get_a_sentence(template: str | None, said: str, opened: Open) -> None:
    engine = opened(byte_level(), **({} if template is None else {"chat_template": template}))
    rows = Rows([{"messages": CHAT}], "mine.jsonl", range(1, 2))
    with pytest.raises(ValueError, match=r"mine\.jsonl") as error:
        Encoder(gguf_tokenizer(engine.file)).completions(rows)
    assert said in str(error.value) and "\n" not in str(error.value)
