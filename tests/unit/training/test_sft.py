"""A script for TRL's SFTTrainer trains here on the tokens that TRL trains on, and says which of its settings do not act."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import examples
import zotune
from chat_tokenizers import chat_tokenizer
from zotune.training.sft import SFTTrainer
from zotune.training.sft.settings import config_of

CHAT = [{"role": "user", "content": "was it good ?"}, {"role": "assistant", "content": "it was ."}]
TURNS = [*CHAT, {"role": "user", "content": "is the plot dull ?"}, {"role": "assistant", "content": "less so , the end is"}]
PAIRS = [{"prompt": "the film was", "completion": " not so good"}, {"prompt": "the plot", "completion": " is dull"}]
SAID = [{"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": ([{"body": "the film was good"}, {"body": "and the end was not so good"}], {"dataset_text_field": "body"}),
    "cut text": ([{"text": "the film was good and the end was not so good"}], {"max_length": 6}),
    "pairs": (PAIRS, {}),
    "whole pairs": (PAIRS, {"completion_only_loss": False}),
    "chats": ([{"messages": TURNS}, {"messages": CHAT}], {}),
    "answers of chats": ([{"messages": TURNS}, {"messages": CHAT}], {"assistant_only_loss": True}),
    "from and value": ([{"conversations": [{"from": each["role"], "value": each["content"]} for each in CHAT]}], {}),
    "pairs of messages": (SAID, {}),
    "packed text": ([{"text": "the film was good"}, {"text": "and the end was not so good"}] * 3, {**WRAPPED, "max_length": 7}),
    "packed pairs": (PAIRS * 3, {**WRAPPED, "max_length": 5}),
    "packed answers of chats": ([{"messages": TURNS}, {"messages": CHAT}] * 2, {**WRAPPED, "max_length": 16, "assistant_only_loss": True}),
}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tokenizer_of() -> Any:
    return chat_tokenizer("generation")


def model_of(tokenizer: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))


def settings(**options: Any) -> Any:
    trl = pytest.importorskip("trl")
    return trl.SFTConfig(
        **{"output_dir": "out", "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, **options}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DATA)
def test_rows_become_the_tokens_of_trl(name: str) -> None:
    trl = pytest.importorskip("trl")
    rows, options = DATA[name]
    tokenizer = tokenizer_of()
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    theirs = trl.SFTTrainer(model_of(tokenizer), settings(**options), **common)
    ours = SFTTrainer(model_of(tokenizer), settings(**options), **common)
    rows_of_trl = [row for row in theirs.train_dataset if any(token >= 0 for token in row.get("labels", row["input_ids"])[1:])]
    assert len(rows_of_trl) == len(theirs.train_dataset) or "packed" in name  # a block without scored tokens adds 0 to the loss there
    for mine, other in zip(ours.train_dataset, rows_of_trl, strict=True):
        ids = [*mine["prompt_ids"], *mine["completion_ids"]]
        mask = mine.get("completion_mask", [True] * len(mine["completion_ids"]))
        assert ids == list(other["input_ids"])
        labels = [token if scored else -100 for token, scored in zip(mine["completion_ids"], mask, strict=True)]
        wanted = other.get("labels", other["input_ids"])
        assert labels == list(wanted)[len(mine["prompt_ids"]) :]
        assert len(mine["prompt_ids"]) == 1 or set(wanted[: len(mine["prompt_ids"])]) == {-100}
    if name == "pairs":  # and the loss of the untrained model is TRL's
        batches = [list(each.get_eval_dataloader(each.train_dataset)) for each in (ours, theirs)]
        loss = ours._loss_of(batches[0][:1])
        with torch.no_grad():
            assert float(loss[0](loss[1][0]).mean()) == pytest.approx(float(theirs.model(**batches[1][0]).loss), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_two_changed_lines_train_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tokenizer = tokenizer_of()
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ["--model", str(tmp_path / "model"), "--train_file", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out")]
    trainer = examples.load("trl_sft.py").main([*words, "--max_steps", "2"])
    changed = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert changed and all("lora" in name for name in changed)
    assert len(zotune.Journal.open(tmp_path / "out" / "journal.zo")) == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_settings_act_or_say_that_they_do_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = config_of(settings(max_steps=-1, learning_rate=2e-4, max_grad_norm=0.5, weight_decay=0.1, seed=7, padding_free=True))
    said = " ".join(caplog.messages)
    assert all(name in said for name in ("learning_rate", "max_grad_norm", "padding_free")) and "weight_decay" not in said
    assert (found.method, found.learning_rate, found.weight_decay, found.seed) == ("lozo-g", "auto", 0.1, 7)
    assert (found.max_steps, found.num_train_epochs, found.lr_scheduler_type, found.max_grad_norm) == (-1, 3.0, "linear", 0.0)
    for field, value in {"loss_type": "dft", "neftune_noise_alpha": 5.0, "optim": "sgd", "use_liger_kernel": True}.items():
        with pytest.raises(ValueError, match=field):
            config_of(settings(**{field: value}))
    with pytest.raises(ValueError, match=r"train_dataset, row 1: .*not a string"):
        SFTTrainer(model_of(tokenizer_of()), settings(), None, [{"text": "good"}, {"text": 3}], processing_class=tokenizer_of())


@pytest.mark.filterwarnings("ignore")
def test_packing_that_is_not_possible_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of()
    wrong: list[tuple[dict[str, Any], Any, str]] = [
        ({"packing": True}, PAIRS, "packing_strategy='bfd'.*changes no loss"),
        ({**WRAPPED, "max_length": 4}, Dataset.from_list([{"input_ids": [1, 2]}]), "rows with input_ids"),
        ({**WRAPPED, "max_length": 4}, Dataset.from_list(PAIRS).to_iterable_dataset(), "is a stream"),
        ({**WRAPPED, "max_length": 1}, PAIRS, "no token to score in blocks of 1"),
    ]
    for options, rows, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            SFTTrainer(model_of(tokenizer), settings(**options), None, rows, processing_class=tokenizer)
    both = settings(**WRAPPED, max_length=4, eval_packing=False)
    trainer = SFTTrainer(model_of(tokenizer), both, None, PAIRS, PAIRS, processing_class=tokenizer)
    assert len(trainer.eval_dataset) == len(PAIRS) != len(trainer.train_dataset)
