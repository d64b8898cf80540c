"""Prompts with a mask: their tokens and the mask's place for two kinds of tokenizers, label words, cuts, and what is refused."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, BertConfig, LlamaConfig, RobertaConfig

from command_cases import word_tokenizer
from zotune import tasks
from zotune.tasks.encoding import Encoder
from zotune.tasks.masked import encode_masked
from zotune.tasks.sources import Rows

ENCODER = RobertaConfig(architectures=["RobertaForMaskedLM"])
PAIR = {"premise": "Two men play. Who wins??", "hypothesis": "Nobody wins.", "label": 1}


@pytest.fixture(scope="module")
def roberta(tiny_lm):
    """A byte-level BPE tokenizer with RoBERTa's special tokens around a text."""
    return with_mask(tiny_lm)


def with_mask(folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


def rows(*values) -> Rows:
    return Rows(list(values), "mine.jsonl", range(1, len(values) + 1))


def encoded(tokenizer, task, row, **limits):
    (example,) = encode_masked(Encoder(tokenizer, **limits), rows(row), task)
    return example, tokenizer.convert_ids_to_tokens(example["prompt_ids"])


def test_tokens_of_a_sentence_and_its_mask(roberta):
    task = tasks.load("sst2", template="mask")
    example, tokens = encoded(roberta, task, {"sentence": "a real joy . ", "label": 1})
    assert tokens == ["<s>", "a", "Ġreal", "Ġjoy", "Ġ.", "ĠIt", "Ġwas", "<mask>", ".", "</s>"]
    assert example["mask_position"] == 7 and example["answer"] == 1
    assert [roberta.convert_ids_to_tokens(ids) for ids in example["option_ids"]] == [["Ġterrible"], ["Ġgreat"]]


def test_each_text_of_a_pair_is_tokenized_alone(roberta):
    """The premise loses its last character, the hypothesis begins small; "??" over a border does not become one token."""
    example, tokens = encoded(roberta, tasks.load("snli", template="mask"), PAIR)
    start = ["<s>", *roberta.tokenize("Two men play. Who wins?")]
    assert tokens == [*start, "?", "<mask>", ",", *roberta.tokenize(" nobody wins."), "</s>"]
    assert example["mask_position"] == len(start) + 1
    assert [roberta.convert_ids_to_tokens(ids) for ids in example["option_ids"]] == [["ĠYes"], ["ĠMaybe"], ["ĠNo"]]


def test_a_blank_before_the_mask_changes_nothing(roberta):
    row = {"sentence": "a joy", "label": 0}
    spaced, plain = (tasks.load("sst2", template=f"{{sentence}} It was{blank}<mask>.") for blank in (" ", ""))
    assert encoded(roberta, spaced, row) == encoded(roberta, plain, row)


def test_tokens_of_a_wordpiece_tokenizer(sentence_encoder):
    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    example, tokens = encoded(tokenizer, tasks.load("trec", template="mask"), {"text": "Who wrote Hamlet?", "coarse_label": 3})
    assert tokens == ["[CLS]", "[MASK]", ":", "who", "wrote", "hamlet", "?", "[SEP]"]
    assert example["mask_position"] == 1
    words = [tokenizer.decode(ids) for ids in example["option_ids"]]
    assert words == ["expression", "entity", "description", "human", "location", "number"]
    _, pair = encoded(tokenizer, tasks.load("rte", template="mask"), PAIR)
    assert pair == ["[CLS]", *["two", "men", "play", ".", "who", "wins", "?", "?", "[MASK]", ",", "nobody", "wins", ".", "[SEP]"]]


def test_demonstrations_stand_before_a_prompt_with_their_label_words(roberta):
    task = tasks.demonstrated(tasks.load("snli", template="mask"), rows({**PAIR, "label": 2}, PAIR))
    example, tokens = encoded(roberta, task, PAIR)
    shown = "Two men play. Who wins?? {}, nobody wins.\n\n"
    text = f"{shown.format('No')}{shown.format('Maybe')}Two men play. Who wins??<mask>, nobody wins."
    assert roberta.decode(example["prompt_ids"]) == f"<s>{text}</s>"
    assert tokens[example["mask_position"]] == "<mask>" and example["answer"] == 1
    with pytest.raises(ValueError, match="tokens without its texts"):
        encoded(roberta, task, PAIR, limit=20, truncate=True)


def test_cuts_keep_the_mask_and_the_end(roberta):
    """The first of two texts leaves 16 tokens, as 240 of 256 in MeZO's code; then the second is cut at its end."""
    task = tasks.load("rte", template="mask")
    long = {"premise": "very " * 60 + "good.", "hypothesis": "so " * 30, "label": 0}
    example, tokens = encoded(roberta, task, long, limit=40, truncate=True)
    assert len(tokens) == 40 and tokens[-1] == "</s>"
    assert example["mask_position"] == 1 + 24 + 1 and tokens[26] == "<mask>"
    assert tokens[1:25] == roberta.tokenize(long["premise"])[:24] and tokens[28:39] == roberta.tokenize(" " + long["hypothesis"])[:11]
    with pytest.raises(ValueError, match=r"line 1: the prompt has .* tokens, more than .*--truncate"):
        encoded(roberta, task, long, limit=40)
    with pytest.raises(ValueError, match="without its texts"):
        encoded(roberta, task, long, limit=4, truncate=True)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{sentence} It was", None, "has no <mask> for a label word: choose --template mask"),
        ("{sentence} It was<mask> or<mask>.", None, "has 2 masks.*write one"),
        ("mask", [" great", " unfathomable"], "the label word 'unfathomable' is the tokens .*--options"),
        ("mask", ["great", " great"], "are the same token"),
    ],
)
def test_prompts_and_label_words_that_cannot_be_scored(roberta, template, options, message):
    task = tasks.load("sst2", template=template, options=options)
    with pytest.raises(ValueError, match=message):
        encoded(roberta, task, {"sentence": "a joy", "label": 0})


def test_texts_and_tokenizers_that_do_not_fit_a_mask(roberta, tiny_lm):
    task, row = tasks.load("sst2", template="mask"), {"sentence": "a <mask> joy", "label": 0}
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: its text holds the mask token"):
        encoded(roberta, task, row)
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        encoded(AutoTokenizer.from_pretrained(tiny_lm), task, row)
    words = word_tokenizer(["[CLS]"])
    words.add_special_tokens({"mask_token": "[MASK]"})
    with pytest.raises(ValueError, match="the label word 'odd' is no token"):
        encoded(words, tasks.load("sst2", template="mask", options=[" odd", " great"]), row)


def test_mlm_takes_the_template_with_a_mask_and_a_mask_takes_mlm(roberta, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"sentence": f"a joy {n}", "label": n % 2}) + "\n" for n in range(8)))
    by_objective = tasks.prepare(roberta, ENCODER, task="sst2", train_file=path, objective="mlm", options=["bad", "good"], k_shot=2)
    by_template = tasks.prepare(roberta, ENCODER, task="sst2", train_file=path, template="mask", options=["bad", "good"], k_shot=2)
    assert by_objective.train == by_template.train and [e["answer"] for e in by_objective.train].count(0) == 2
    assert by_objective.task.template == "mask" and by_template.train_objective == by_template.eval_objective == "mlm"
    batch = by_objective.collate_train(by_objective.train)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask"), (4, 9)), "positions": (4, 1), "option_ids": (4, 2), "answer": (4,)
    }  # fmt: skip
    assert (batch["input_ids"].gather(1, batch["positions"]) == roberta.mask_token_id).all()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LlamaConfig(), {"objective": "mlm"}, "needs a masked language model such as BERT or RoBERTa, and llama is none"),
        (LlamaConfig(), {"template": "mask"}, "the prompt has a <mask>.*--objective mlm"),
        (ENCODER, {"objective": "classifier", "template": "mask"}, "the prompt has a <mask>"),
        (BertConfig(architectures=["BertForSequenceClassification"]), {"objective": "mlm"}, "this bert is a sequence classifier"),
        (ENCODER, {"objective": "mlm", "task": "copa"}, "answers of its own in every row"),
        (ENCODER, {"objective": "mlm", "task": "squad"}, "needs a task with labels"),
    ],
)
def test_models_and_tasks_without_label_words(roberta, data_dir, config, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.prepare(roberta, config, **{"task": "sst2", "data_dir": data_dir, "num_train": 2, "num_eval": 2, **options})
