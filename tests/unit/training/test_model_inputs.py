"""What a trainer makes of the data before the model gets them: padding, token ids, texts, and which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import zotune
from trainer_cases import journal_of, labelled_rows, tiny_llama, trainer
from zotune import objectives, tasks
from zotune.tasks.encoding import Encoder
from zotune.tasks.sources import Rows


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_lm)


# --- a decoder's classification head scores the last token of a text, whatever its padding ---


def decoder_classifier(kind: str, pad_token_id: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            fields = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300, "num_labels": 2}
            return GPT2ForSequenceClassification(GPT2Config(pad_token_id=pad_token_id, **fields)).eval()
        fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 300}
        return LlamaForSequenceClassification(LlamaConfig(pad_token_id=pad_token_id, num_labels=2, **fields)).eval()


def classified(count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(10, 300, (3 + number,), generator=generator).tolist(), "label": number % 2} for number in range(count)
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_score_alone_is_the_score_in_a_batch(kind: str) -> None:
    model, rows, collate = decoder_classifier(kind), classified(), tasks.ClassifierCollator(pad_token_id=7)
    together = objectives.class_scores(model, collate(rows))
    alone = torch.cat([objectives.class_scores(model, collate([row])) for row in rows])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        objectives.ClassifierLoss(model)(collate(rows)), torch.cat([objectives.ClassifierLoss(model)(collate([row])) for row in rows])
    )


@pytest.mark.parametrize("objective", [None, "classifier"])
def test_predictions_do_not_depend_on_the_size_of_a_batch(objective: str | None, tmp_path: Path) -> None:
    found = []
    for size in (1, 6):
        run = trainer(tmp_path, decoder_classifier("llama"), objective=objective, per_device_eval_batch_size=size,
                      data_collator=tasks.ClassifierCollator(pad_token_id=7))  # fmt: skip
        found.append(run.predict(classified()))
    torch.testing.assert_close(*(torch.tensor(one.predictions) for one in found))
    assert found[0].metrics["test_loss"] == pytest.approx(found[1].metrics["test_loss"], rel=1e-5)


def test_training_losses_do_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    losses = []
    for size in (1, 6):
        run = trainer(tmp_path / str(size), decoder_classifier("llama"), method="mezo", max_steps=1, learning_rate=0.0,
                      train_dataset=classified(), data_collator=tasks.ClassifierCollator(pad_token_id=7),
                      per_device_train_batch_size=size, gradient_accumulation_steps=6 // size)  # fmt: skip
        run.train()
        losses += [record.loss for record in journal_of(tmp_path / str(size)).records() if not isinstance(record, dict)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_decoder_classifiers_padding_is_the_tokenizers(tokenizer: Any, data_dir: Path) -> None:
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id + 5)
    tasks.prepare(tokenizer, config, task="sst2", data_dir=data_dir, objective="classifier", num_eval=4, parts=["eval"])
    assert config.pad_token_id == tokenizer.pad_token_id


# --- tokens without embeddings ---


def test_a_token_without_an_embedding_is_named(tiny_lm: Path, tmp_path: Path) -> None:
    larger = AutoTokenizer.from_pretrained(tiny_lm)
    larger.add_tokens(["<new>"])
    base = LlamaConfig(vocab_size=len(larger) - 1, max_position_embeddings=64)
    plain, new = ({"text": text} for text in ("a fine film", "a <new> film"))
    for rows in ([plain], [plain, new]):
        path = tmp_path / f"{len(rows)}.jsonl"
        path.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in rows))
        if rows == [plain]:
            assert tasks.prepare(larger, base, train_file=path).train  # a token that no text has does no harm
        else:
            with pytest.raises(ValueError, match=r"'<new>' \(\d+\) has no row .*resize_token_embeddings"):
                tasks.prepare(larger, base, train_file=path)
    larger.add_special_tokens({"pad_token": "<pad-new>"})
    with pytest.raises(ValueError, match="'<pad-new>'"):
        tasks.prepare(larger, base, train_file=tmp_path / "1.jsonl")


def test_token_ids_outside_of_the_embeddings_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "input_ids": [100, *row["input_ids"][1:]]} for row in labelled_rows()]
    run = trainer(tmp_path, method="mezo", max_steps=1, train_dataset=rows, data_collator=None)
    with pytest.raises(ValueError, match="the token 100 has no row in the model's embeddings, which have 100"):
        run.train()


# --- data sets of texts ---

TEXTS = [{"text": "A fine film."}, {"text": "Dreadful."}] * 4
PAIRS = [{"prompt": "A fine film. It was", "completion": " great"}, {"prompt": "Dreadful. It was", "completion": " bad"}] * 4
ANSWERS = [[{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": text}] for text in ("great", "bad")]
CHATS = [{"messages": messages} for messages in ANSWERS * 4]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize("rows", [TEXTS, PAIRS, CHATS], ids=["text", "pairs", "chats"])
def test_texts_are_encoded_as_the_command_does(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer.chat_template = TEMPLATE
    expected = Encoder(tokenizer, 32).completions(Rows(rows, "", range(len(rows))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    for given in (rows, datasets.Dataset.from_list(rows)):
        run = trainer(tmp_path, model, train_dataset=given, eval_dataset={"own": given}, data_collator=None, processing_class=tokenizer)
        assert run.train_dataset == expected and run.eval_dataset == {"own": expected}
        assert isinstance(run.data_collator, tasks.LanguageModelCollator)
    assert run.evaluate(given)["eval_loss"] > 0
    stream = trainer(tmp_path, model, train_dataset=datasets.Dataset.from_list(rows).to_iterable_dataset(), data_collator=None,
                     processing_class=tokenizer, max_steps=1)  # fmt: skip
    assert [{name: value for name, value in row.items() if value is not None} for row in stream.train_dataset] == expected


def test_texts_are_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    run = trainer(tmp_path, model, train_dataset=TEXTS, data_collator=None, processing_class=tokenizer, method="mezo", max_steps=1)
    assert run.train().training_loss > 0


def test_texts_need_a_tokenizer_and_a_language_model(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class=tokenizer"):
        trainer(tmp_path, train_dataset=TEXTS, data_collator=None)
    with pytest.raises(ValueError, match="give both alike"):
        trainer(tmp_path, train_dataset=TEXTS, eval_dataset=labelled_rows(), data_collator=None, processing_class=tokenizer)
    with pytest.raises(ValueError, match="tokenize it"):
        trainer(tmp_path, decoder_classifier("llama"), train_dataset=TEXTS, data_collator=None, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"row 0: the text has .* more than the model's context of 32"):
        trainer(tmp_path, train_dataset=[{"text": "very " * 40}], data_collator=None, processing_class=tokenizer)


# --- compiled models ---


def test_of_a_compiled_model_the_inner_one_is_trained(tmp_path: Path) -> None:
    model = tiny_llama()
    run = trainer(tmp_path, torch.compile(model), method="lozo", max_steps=1)
    assert run.model is model
    run.train()


def test_an_optimizer_of_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(nn.Linear(3, 1)))):
        with pytest.raises(ValueError, match=r"is compiled.*without torch\.compile"):
            zotune.ZerothOrder(compiled, "lozo")
    model.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        zotune.ZerothOrder(model, "lozo")
