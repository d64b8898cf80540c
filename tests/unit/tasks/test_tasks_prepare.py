"""The whole way from a task's name to accuracies, and everything that is refused before any work starts."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, LlamaConfig, T5Config

from zotune import objectives, tasks
from zotune.training.evaluation import greedy


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture(scope="module")
def config(tiny_lm):
    return AutoConfig.from_pretrained(tiny_lm)


@pytest.fixture(scope="module")
def model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()


@torch.inference_mode()
def accuracy(model, data, rows, batch_size=64) -> float:
    scores, answers = [], []
    rows = sorted(rows, key=lambda example: len(example["prompt_ids"]))  # little padding, little time
    for start in range(0, len(rows), batch_size):
        batch = data.collate_eval(rows[start : start + batch_size])
        scores.append(objectives.choice_scores(model, batch).numpy())
        answers.append(batch["answer"].numpy())
    return data.compute_metrics((np.concatenate(scores), np.concatenate(answers)))["accuracy"]


@pytest.mark.parametrize(("template", "expected"), [("this-movie-is", 0.605), ("this-movie-is-good", 0.687)])
def test_zero_shot_accuracy_on_sst2_is_the_models_published_one(tokenizer, config, model, data_dir, template, expected):
    data = tasks.prepare(tokenizer, config, task="sst2", template=template, data_dir=data_dir, parts=["eval"])
    assert data.train is None and len(data.eval) == 872
    assert accuracy(model, data, data.eval) == pytest.approx(expected, abs=0.01)


@torch.inference_mode()
def test_all_forms_of_a_batch_score_rows_as_the_whole_text_does(tokenizer, config, model, data_dir):
    task = tasks.load("sst2")
    data = tasks.prepare(tokenizer, config, task=task, data_dir=data_dir, num_eval=12, parts=["eval"])
    fast = objectives.choice_scores(model, data.collate_eval(data.eval))
    for shared_prompt in (True, False):
        general = tasks.ChoicesCollator(tokenizer.pad_token_id, single_token_form=False, shared_prompt=shared_prompt)(data.eval)
        torch.testing.assert_close(objectives.choice_scores(model, general), fast, rtol=1e-4, atol=1e-4)
    for example, scores in zip(data.eval, fast, strict=True):
        text = tokenizer.decode(example["prompt_ids"], skip_special_tokens=True)
        for option, score in zip(task.options, scores, strict=True):
            ids = tokenizer(text + option, return_tensors="pt")["input_ids"]
            by_hand = model(ids).logits[0, -2].log_softmax(0)[ids[0, -1]]
            torch.testing.assert_close(score, by_hand, rtol=1e-4, atol=1e-4)


def test_options_that_differ_by_row_are_scored_too(tokenizer, config, model, data_dir):
    data = tasks.prepare(tokenizer, config, task="copa", data_dir=data_dir, parts=["eval"])
    batch = data.collate_eval(data.eval[:8])
    one_row_an_option = tasks.ChoicesCollator(tokenizer.pad_token_id, shared_prompt=False, length_normalize=True)(data.eval[:8])
    assert batch["input_ids"].numel() < 0.8 * one_row_an_option["input_ids"].numel()
    with torch.inference_mode():
        scores, expected = (objectives.choice_scores(model, form) for form in (batch, one_row_an_option))
    assert scores.shape == (8, 2)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_options_of_different_lengths_are_scored_by_their_mean(tokenizer, config, model, data_dir):
    data = tasks.prepare(tokenizer, config, task="copa", data_dir=data_dir, num_eval=4, parts=["eval"])
    batch = data.collate_eval(data.eval)
    sums = objectives.choice_scores(model, {name: value for name, value in batch.items() if name != "option_lengths"})
    lengths = torch.tensor([[len(option) for option in example["option_ids"]] for example in data.eval])
    assert lengths.unique().numel() > 1
    torch.testing.assert_close(objectives.choice_scores(model, batch), sums / lengths)


@torch.inference_mode()
def test_a_generated_answer_is_the_most_likely_token_after_token(tokenizer, config, model, data_dir):
    data = tasks.prepare(tokenizer, config, task="squad", data_dir=data_dir, num_eval=3, parts=["eval"])
    assert (data.train_objective, data.eval_objective, data.main_metric) == ("lm", "generation", "token_f1")
    assert data.num_labels is None
    batch = data.collate_eval(data.eval)
    batch["max_new_tokens"][:] = 6
    written = greedy(model, batch)
    stops = set(batch["stop_ids"][0].tolist())
    assert tokenizer.eos_token_id in stops and "\n" in [tokenizer.decode([stop]) for stop in stops]
    for example, row in zip(data.eval, written.tolist(), strict=True):
        ids = list(example["prompt_ids"])
        for token in row:
            if token == objectives.IGNORE:
                assert ids[-1] in stops
                continue
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_a_generated_answer_is_learnt_with_the_end_of_its_line(tokenizer, config, data_dir):
    data = tasks.prepare(tokenizer, config, task="drop", data_dir=data_dir, num_train=4, num_dev=2, num_eval=2, truncate=True)
    stops = data.collate_eval(data.eval)["stop_ids"][0].tolist()
    assert all(example["completion_ids"][-1] == stops[0] for example in data.train)
    assert [example["reference"] for example in [*data.dev, *data.eval]] == [0, 1, 2, 3]
    assert len(data.compute_metrics.references) == 4


def test_room_is_left_for_what_is_generated(tokenizer, config, data_dir):
    limits = {"task": "squad", "data_dir": data_dir, "num_train": 4, "num_eval": 4, "max_length": 80, "truncate": True}
    data = tasks.prepare(tokenizer, config, **limits)
    assert all(len(example["prompt_ids"]) + 50 - 1 <= 80 for example in data.eval)
    assert any(len(example["prompt_ids"]) + 50 - 1 > 80 for example in data.train)
    with pytest.raises(ValueError, match=r"line \d+: the prompt has \d+ tokens and an answer may have 50, more than the --max_length"):
        tasks.prepare(tokenizer, config, **{**limits, "truncate": False, "parts": ["eval"]})


def test_demonstrations_of_a_generation_task_are_solved(tokenizer, config, data_dir):
    data = tasks.prepare(
        tokenizer, config, task="drop", data_dir=data_dir, num_demonstrations=1, num_eval=1, parts=["eval"], truncate=True, max_length=2048
    )
    text = tokenizer.decode(data.eval[0]["prompt_ids"])
    assert text.count("Answer:") == 2 and text.endswith("Answer:")


def test_splits_of_a_thousand_five_hundred_and_a_thousand(tokenizer, config, data_dir):
    def texts(part):
        return [tuple(example["prompt_ids"]) for example in part]

    first, again = (
        tasks.prepare(tokenizer, config, task="wic", data_dir=data_dir, num_train=1000, num_dev=500, num_eval=1000, seed=3) for _ in "ab"
    )
    assert (len(first.train), len(first.dev), len(first.eval)) == (1000, 500, 638)  # all there are
    assert (first.train, first.dev, first.eval) == (again.train, again.dev, again.eval)
    assert not set(texts(first.train)) & set(texts(first.dev))


@pytest.mark.parametrize("k", [16, 512])
def test_k_shot_leaves_dev_alone(tokenizer, config, data_dir, k):
    few, other = (
        tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, k_shot=shots, num_dev=100, parts=["train"], seed=1)
        for shots in (k, 8)
    )
    assert collections.Counter(example["answer"] for example in few.train) == {0: k, 1: k}
    assert few.dev == other.dev


def test_training_is_by_default_on_the_right_options_tokens(tokenizer, config, model, data_dir):
    data = tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, num_train=16, num_dev=8, num_eval=8)
    assert (data.train_objective, data.eval_objective, data.main_metric) == ("lm", "choices", "accuracy")
    assert (len(data.train), len(data.dev), len(data.eval)) == (16, 8, 8)
    assert (data.num_labels, data.label_names) == (2, ("negative", "positive"))
    batch = data.collate_train(data.train)
    words = [tokenizer.decode(row) for row in batch["targets"]]
    assert words == [[" terrible", " great"][example["answer"]] for example in data.train]
    with torch.inference_mode():
        losses = objectives.objective(data.train_objective, model)(batch)
    assert losses.shape == (16,) and losses.isfinite().all()


def test_training_on_the_options_scores(tokenizer, config, model, data_dir):
    data = tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, num_train=4, objective="choices", parts=["train"])
    batch = data.collate_train(data.train)
    with torch.inference_mode():
        losses = objectives.objective("choices", model)(batch)
    assert data.eval is None and losses.shape == (4,)


def test_an_encoder_gets_classifier_examples(tokenizer, data_dir):
    config = BertConfig(architectures=["BertModel"])
    data = tasks.prepare(tokenizer, config, task="rte", data_dir=data_dir, num_train=4, num_eval=4, truncate=True)
    assert (data.train_objective, data.eval_objective, data.num_labels) == ("classifier", "classifier", 2)
    assert set(data.collate_train(data.train)) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(ValueError, match=r"objective 'lm' needs a causal language model.*bert"):
        tasks.prepare(tokenizer, config, task="rte", data_dir=data_dir, objective="lm")


def test_which_models_are_encoders(config):
    assert not tasks.is_encoder(config)
    assert not tasks.is_encoder(LlamaConfig())
    assert not tasks.is_encoder(BertConfig(is_decoder=True))
    assert not tasks.is_encoder(None)
    assert tasks.is_encoder(BertConfig(architectures=["BertForMaskedLM"]))
    assert tasks.is_encoder(LlamaConfig(architectures=["LlamaForSequenceClassification"]))


def test_a_decoder_classifier_is_told_its_padding_token(tokenizer, data_dir):
    config = LlamaConfig(pad_token_id=None)
    tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, objective="classifier", num_train=2, num_eval=2)
    assert config.pad_token_id == tokenizer.pad_token_id


def test_k_shot(tokenizer, config, data_dir):
    data = tasks.prepare(tokenizer, config, task="trec", data_dir=data_dir, k_shot=4, num_dev=30, seed=2, num_eval=5)
    assert collections.Counter(example["answer"] for example in data.train) == dict.fromkeys(range(6), 4)
    assert len(data.dev) == 30


def test_the_same_seed_prepares_the_same_data(tokenizer, config, data_dir):
    def prepare(seed):
        return tasks.prepare(tokenizer, config, task="mr", data_dir=data_dir, num_train=9, num_eval=9, seed=seed)

    state = torch.get_rng_state()
    first, second, other = prepare(1), prepare(1), prepare(2)
    assert torch.equal(state, torch.get_rng_state())
    assert first == second
    assert first.train != other.train and first.eval != other.eval


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_files_of_ones_own_without_a_task(tokenizer, config, model, tmp_path):
    train = lines(tmp_path / "train.jsonl", *({"prompt": f"Film {i}:", "completion": " good"} for i in range(6)))
    held_out = lines(tmp_path / "eval.jsonl", {"text": "A good film."}, {"text": "A bad one."})
    data = tasks.prepare(tokenizer, config, train_file=train, eval_file=held_out, num_dev=2)
    assert (len(data.train), len(data.dev), len(data.eval)) == (4, 2, 2)
    assert (data.train_objective, data.eval_objective, data.main_metric) == ("lm", "lm", "loss")
    assert data.compute_metrics is None and data.task is None and data.num_labels is None
    with torch.inference_mode():
        assert objectives.objective("lm", model)(data.collate_eval(data.eval)).shape == (2,)


def test_files_of_ones_own_with_a_tasks_columns(tokenizer, config, tmp_path, data_dir):
    train = lines(tmp_path / "train.jsonl", {"sentence": "fine .", "label": "positive"}, {"sentence": "no .", "label": 0})
    data = tasks.prepare(tokenizer, config, task="sst2", train_file=train)
    assert [example["answer"] for example in data.train] == [1, 0]
    assert data.eval is None  # no published split behind the user's back
    with_eval = tasks.prepare(tokenizer, config, task="sst2", train_file=train, data_dir=data_dir, num_eval=3)
    assert len(with_eval.eval) == 3


def test_a_loaded_task_is_taken_as_it_is(tokenizer, config, data_dir):
    task = tasks.load("sst2", template="mezo")
    data = tasks.prepare(tokenizer, config, task=task, data_dir=data_dir, num_train=1, parts=["train"])
    assert data.task is task
    assert tokenizer.decode(data.train[0]["prompt_ids"]).endswith(" It was")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"nothing to train on: pass --task .*, --train_file or --dataset_name"),
        ({"task": "sst3"}, r"unknown task 'sst3'; did you mean 'sst[25]'"),
        ({"task": "sst2", "objective": "rl"}, r"unknown objective 'rl': choose one of lm, choices, accuracy, classifier, mlm, reward"),
        ({"train_file": "text.jsonl", "objective": "choices"}, r"objective 'choices' needs a task with labels"),
        ({"train_file": "text.jsonl", "template": "{text}:"}, r"template and options need .* --task"),
        ({"train_file": "x.jsonl"}, r"no file x.jsonl"),
        ({"parts": ["eval"]}, r"nothing to evaluate: pass --task .* or --eval_file"),
        ({"task": "sst2", "objective": "classifier", "template": "mezo"}, r"has no prompt: leave template and options"),
        ({"task": "sst2", "num_train": 0}, r"num_train=0 must be positive"),
        ({"task": "sst2", "max_length": 0}, r"max_length=0 is too short"),
    ],
)
def test_what_cannot_be_done_is_one_clear_sentence(tokenizer, config, arguments, message, tmp_path, monkeypatch):
    lines(tmp_path / "text.jsonl", {"text": "a film"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        tasks.prepare(tokenizer, config, **arguments)
    assert "\n" not in str(caught.value)


def test_k_shot_needs_labels(tokenizer, config, tmp_path):
    own = lines(tmp_path / "x.jsonl", {"text": "a film"})
    with pytest.raises(ValueError, match=r"k_shot needs a task with labels"):
        tasks.prepare(tokenizer, config, train_file=own, k_shot=2)


def test_a_bad_row_of_ones_own_file_is_named(tokenizer, config, tmp_path):
    own = lines(tmp_path / "x.jsonl", {"sentence": "a", "label": 1}, {"sentence": "b", "label": 3})
    for arguments in ({}, {"k_shot": 1}):
        with pytest.raises(ValueError, match=r"x.jsonl, line 2: column 'label' holds 3, which is none of the options"):
            tasks.prepare(tokenizer, config, task="sst2", train_file=own, **arguments)


def test_a_template_with_an_unknown_column_names_the_nearest(tokenizer, config, data_dir):
    with pytest.raises(ValueError, match=r"no column 'sentense': the row has .*; did you mean 'sentence'"):
        tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, template="{sentense} It was")


def test_an_encoder_decoder_writes_the_answers_of_a_task(tokenizer, data_dir):
    data = tasks.prepare(tokenizer, T5Config(decoder_start_token_id=0), task="sst2", data_dir=data_dir)
    assert (data.kind.name, data.train_objective, data.main_metric) == ("seq2seq", "seq2seq", "exact_match")
    with pytest.raises(ValueError, match=r"has no decoder_start_token_id"):
        tasks.prepare(tokenizer, T5Config(), task="sst2", data_dir=data_dir)


def test_an_encoder_decoder_has_no_scores_of_options(tokenizer):
    with pytest.raises(ValueError, match=r"t5 is an encoder-decoder model"):
        tasks.prepare(tokenizer, T5Config(), task="sst2", objective="choices")
