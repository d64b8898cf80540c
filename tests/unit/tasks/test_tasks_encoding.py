"""Token ids: the boundary of prompt and option, special tokens, chats, one's own text, and length limits."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, RobertaConfig

from zotune import tasks
from zotune.tasks.collators import ClassifierCollator, LanguageModelCollator
from zotune.tasks.encoding import Encoder, context_limit, pad_token_id
from zotune.tasks.sources import Rows

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Was it good?"},
    {"role": "assistant", "content": "It was."},
    {"role": "user", "content": "And the end?"},
    {"role": "assistant", "content": "Less so."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture
def chat_tokenizer(tiny_lm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.chat_template = CHATML
    return tokenizer


def word_tokenizer(**special):
    """A tokenizer of characters that, as SentencePiece does, puts a blank of its own in front."""
    letters = ["<unk>", "<pad>", "<eos>", "▁", *"abcdefghijklmnopqrstuvwxyz.:"]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def rows(*values) -> Rows:
    return Rows(list(values), "mine.jsonl", range(1, len(values) + 1))


def scored_text(tokenizer, example) -> str:
    batch = LanguageModelCollator(pad_token_id=0)([example])
    return tokenizer.decode(batch["targets"][0])


def test_only_the_prompt_of_choices_has_special_tokens(tokenizer):
    (example,) = Encoder(tokenizer).choices(rows({"sentence": "a joy . ", "label": 1}), tasks.load("sst2"))
    assert example["prompt_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(example["prompt_ids"]) == "<s>a joy . This movie is"
    assert [tokenizer.decode(ids) for ids in example["option_ids"]] == [" terrible", " great"]
    assert [len(ids) for ids in example["option_ids"]] == [1, 1]
    assert example["answer"] == 1


def test_prompt_and_option_are_the_tokens_of_the_whole_text(tokenizer, data_dir):
    for name in tasks.names():
        task = tasks.load(name)
        sample = tasks.load_rows(task, "eval", data_dir).select(range(40))
        for row, example in zip(sample, Encoder(tokenizer).choices(sample, task), strict=True):
            prompt, options = task.render(row)
            for option, ids in zip(options, example["option_ids"], strict=True):
                assert example["prompt_ids"] + ids == tokenizer(prompt + option)["input_ids"]


def test_no_blank_of_the_tokenizer_parts_prompt_and_option():
    tokenizer = word_tokenizer(eos_token="<eos>")
    task = tasks.load("sst2", template="{sentence}:", options=[" bad", " good"])
    (example,) = Encoder(tokenizer).choices(rows({"sentence": "a", "label": 0}), task)
    assert tokenizer.convert_ids_to_tokens(example["prompt_ids"]) == ["▁", "a", ":"]
    assert tokenizer.convert_ids_to_tokens(example["option_ids"][0]) == ["▁", "b", "a", "d"]
    (own,) = Encoder(tokenizer).completions(rows({"prompt": "a", "completion": "b"}))
    assert tokenizer.convert_ids_to_tokens(own["completion_ids"]) == ["b", "<eos>"]


def test_options_that_are_the_same_tokens_cannot_be_told_apart():
    task = tasks.load("sst2", template="{sentence}:", options=[" É", " Ü"])
    with pytest.raises(ValueError, match=r"mine.jsonl, line 1: two of the options .* are the same tokens"):
        Encoder(word_tokenizer(eos_token="<eos>")).choices(rows({"sentence": "a", "label": 0}), task)


def test_a_special_token_after_a_text_is_not_part_of_a_prompt(tiny_lm):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    plain = Encoder(tokenizer).choices(rows({"sentence": "a joy .", "label": 1}), tasks.load("sst2"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert tokenizer("a")["input_ids"][-1] == 2
    assert Encoder(tokenizer).choices(rows({"sentence": "a joy .", "label": 1}), tasks.load("sst2")) == plain


def test_a_label_outside_the_options_names_the_line(tokenizer):
    bad = rows({"sentence": "a", "label": 1}, {"sentence": "b", "label": 7})
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: column 'label' holds 7, which is none of the options 0"):
        Encoder(tokenizer).choices(bad, tasks.load("sst2"))


def test_a_completion_and_the_end_of_text_are_scored(tokenizer):
    (example,) = Encoder(tokenizer).completions(rows({"prompt": "The film was", "completion": " a great joy."}))
    assert tokenizer.decode(example["prompt_ids"]) == "<s>The film was"
    assert scored_text(tokenizer, example) == " a great joy.</s>"


def test_of_a_text_every_token_is_scored(tokenizer):
    (example,) = Encoder(tokenizer).completions(rows({"text": "The film was a joy."}))
    assert scored_text(tokenizer, example) == "The film was a joy.</s>"


def test_without_a_start_token_the_first_token_is_not_scored():
    tokenizer = word_tokenizer(eos_token="<eos>")
    (example,) = Encoder(tokenizer).completions(rows({"text": "ab"}))
    assert example["prompt_ids"] == []
    batch = LanguageModelCollator(pad_token_id=0)([example])
    assert tokenizer.convert_ids_to_tokens(batch["targets"][0].tolist()) == ["a", "b", "<eos>"]
    assert batch["positions"].tolist() == [[0, 1, 2]]


def test_of_a_chat_the_assistants_turns_are_scored(chat_tokenizer):
    (example,) = Encoder(chat_tokenizer).completions(rows({"messages": CHAT}))
    assert scored_text(chat_tokenizer, example) == "It was.</s>\nLess so.</s>\n"
    whole = chat_tokenizer.decode(example["prompt_ids"] + example["completion_ids"])
    assert whole == chat_tokenizer.apply_chat_template(CHAT, tokenize=False)
    (single,) = Encoder(chat_tokenizer).completions(rows({"messages": CHAT[:2]}))
    assert "completion_mask" not in single
    assert scored_text(chat_tokenizer, single) == "It was.</s>\n"


def test_messages_after_the_last_answer_do_not_count(chat_tokenizer):
    encoder = Encoder(chat_tokenizer)
    assert encoder.completions(rows({"messages": CHAT[:3]})) == encoder.completions(rows({"messages": CHAT[:2]}))


def test_a_template_that_rewrites_earlier_turns_scores_the_last(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{{ m['content'] if loop.last else m['content'] | upper }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(ValueError, match=r"does not keep the last message at the end"):
        Encoder(chat_tokenizer).completions(rows({"messages": CHAT}))
    chat_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (example,) = Encoder(chat_tokenizer).completions(rows({"messages": CHAT}))
    assert scored_text(chat_tokenizer, example) == "Less so.\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, r"column 'messages' must hold a list"),
        ({"messages": [{"role": "user"}]}, r"column 'messages' must hold a list"),
        ({"messages": CHAT[:1]}, r"no message has the role 'assistant'"),
        ({"prompt": 3, "completion": "x"}, r"column 'prompt' holds int, not a string"),
        ({"prompt": "x", "completion": ""}, r"nothing to score in 'prompt' and 'completion'"),
        ({"text": ""}, r"nothing to score in 'text'"),
    ],
)
def test_a_malformed_row_names_the_line(chat_tokenizer, row, message):
    with pytest.raises(ValueError, match=rf"^mine.jsonl, line 1: {message}"):
        Encoder(chat_tokenizer).completions(rows(row))


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match=r"mine.jsonl, line 1: the tokenizer has no chat template"):
        Encoder(tokenizer).completions(rows({"messages": CHAT}))


def test_what_a_chat_template_refuses_names_the_line(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1: the tokenizer's chat template refuses .*Roles must alternate"):
        Encoder(chat_tokenizer).completions(rows({"messages": CHAT}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "answer"], r"mine.jsonl needs the columns prompt and completion.*'completion' is missing"),
        (["txet"], r"mine.jsonl needs the columns .* it has txet; did you mean 'text'"),
    ],
)
def test_unknown_columns_of_ones_own_file(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        Encoder(tokenizer).completions(rows(dict.fromkeys(columns, "x")))


LONG = "this is a long sentence about a film that never ends " * 20


def test_a_prompt_beyond_the_context_names_row_lengths_and_fix(tokenizer):
    long = rows({"sentence": "short", "label": 0}, {"sentence": LONG, "label": 0})
    length = len(tokenizer(f"{LONG.strip()} This movie is")["input_ids"])
    with pytest.raises(
        ValueError,
        match=rf"mine.jsonl, line 2: the prompt has {length} tokens and its longest option 1, "
        r"more than the model's context of 64: pass --truncate",
    ):
        Encoder(tokenizer, limit=64).choices(long, tasks.load("sst2"))
    with pytest.raises(ValueError, match=r"more than the --max_length of 64: raise --max_length, or pass --truncate"):
        Encoder(tokenizer, limit=64, limit_is_users=True).choices(long, tasks.load("sst2"))


def test_truncation_keeps_the_start_token_and_the_prompts_end(tokenizer):
    task = tasks.load("sst2")
    (example,) = Encoder(tokenizer, limit=20, truncate=True).choices(rows({"sentence": LONG, "label": 0}), task)
    whole = tokenizer(task.render({"sentence": LONG})[0])["input_ids"]
    assert example["prompt_ids"] == [tokenizer.bos_token_id, *whole[-19:]]
    (fits,) = Encoder(tokenizer, limit=len(whole)).choices(rows({"sentence": LONG, "label": 0}), task)
    assert fits["prompt_ids"] == whole  # the option's one token is predicted, not fed


def test_truncation_keeps_a_texts_beginning_and_a_chats_end(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, limit=20, truncate=True)
    (text,) = encoder.completions(rows({"text": LONG}))
    whole = chat_tokenizer(LONG)["input_ids"]
    assert text["prompt_ids"] + text["completion_ids"] == whole[:21]
    (chat,) = Encoder(chat_tokenizer, limit=30, truncate=True).completions(rows({"messages": [{"role": "user", "content": LONG}, CHAT[3]]}))
    assert scored_text(chat_tokenizer, chat) == "Less so.</s>\n"
    for example, length in ((text, 20), (chat, 30)):
        assert LanguageModelCollator(pad_token_id=0)([example])["input_ids"].shape == (1, length)
    for row in ({"text": LONG}, {"messages": [{"role": "user", "content": LONG}, CHAT[3]]}):
        with pytest.raises(ValueError, match=r"line 1: the (text|chat) has \d+ tokens, more than the model's context"):
            Encoder(chat_tokenizer, limit=20).completions(rows(row))


def test_a_completion_beyond_the_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"line 1: its completion has \d+ tokens, more than the model's context of 20"):
        Encoder(tokenizer, limit=20, truncate=True).completions(rows({"prompt": "a", "completion": LONG}))


def test_the_limit_is_the_smallest_of_model_tokenizer_and_user(tokenizer):
    assert context_limit(tokenizer, LlamaConfig(max_position_embeddings=100)) == (100, False)
    assert context_limit(tokenizer, LlamaConfig(max_position_embeddings=4096)) == (512, False)
    assert context_limit(tokenizer, LlamaConfig(max_position_embeddings=100), max_length=50) == (50, True)
    assert context_limit(tokenizer, LlamaConfig(max_position_embeddings=100), max_length=200) == (100, False)
    unlimited = word_tokenizer()
    assert context_limit(unlimited, GPT2Config(n_positions=77)) == (77, False)
    assert context_limit(unlimited, RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == (512, False)
    assert context_limit(unlimited, BertConfig(max_position_embeddings=512)) == (512, False)
    assert context_limit(unlimited, None) == (None, False)
    with pytest.raises(ValueError, match=r"max_length=1 is too short"):
        context_limit(unlimited, None, max_length=1)


def test_the_padding_token_or_the_end_of_text():
    assert pad_token_id(word_tokenizer(pad_token="<pad>", eos_token="<eos>")) == 1
    assert pad_token_id(word_tokenizer(eos_token="<eos>")) == 2
    with pytest.raises(ValueError, match=r"neither a padding token nor an end-of-text token: set one, e.g."):
        pad_token_id(word_tokenizer())


def test_a_classifier_reads_one_text_or_a_pair(tokenizer, data_dir):
    encoder = Encoder(tokenizer)
    single = encoder.classifier(rows({"sentence": "a joy . ", "label": 1}), tasks.load("sst2"))
    assert single == [{"input_ids": tokenizer("a joy .")["input_ids"], "label": 1}]
    pair = rows({"premise": "It rains.", "hypothesis": "It is wet.", "label": 0})
    (example,) = encoder.classifier(pair, tasks.load("rte"))
    assert example["input_ids"] == tokenizer("It rains.", "It is wet.")["input_ids"]
    batch = ClassifierCollator(pad_token_id=0)([*single, example])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(single[0]["input_ids"]), len(example["input_ids"])]


def test_a_classifiers_text_is_cut_only_on_request(tokenizer):
    long = rows({"sentence": LONG, "label": 1})
    with pytest.raises(ValueError, match=r"line 1: the text has \d+ tokens, more than the model's context of 16"):
        Encoder(tokenizer, limit=16).classifier(long, tasks.load("sst2"))
    (example,) = Encoder(tokenizer, limit=16, truncate=True).classifier(long, tasks.load("sst2"))
    assert len(example["input_ids"]) == 16


def test_options_of_each_row_are_no_classes(tokenizer):
    with pytest.raises(ValueError, match=r"task 'copa' has answers of its own in every row"):
        Encoder(tokenizer).classifier(rows({}), tasks.load("copa"))
