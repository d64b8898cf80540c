"""Options that the papers' protocols need: a loss over a batch's tokens, demonstrations per example, another first token."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_cases import save_data, save_model
from zotune.objectives import LanguageModelLoss
from zotune.objectives.output_gradients import recording
from zotune.tasks import prepare


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return AutoTokenizer.from_pretrained("my-model")


def test_the_loss_over_tokens_is_that_of_transformers(tokenizer, tmp_path):
    texts = [" great", " a really good film", " terrible", " the plot is flat and the cast is sharp"]
    lines = [json.dumps({"prompt": "the film is", "completion": text}) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    model = AutoModelForCausalLM.from_pretrained("my-model").eval()
    losses = {}
    for over in ("examples", "tokens"):
        data = prepare(tokenizer, model.config, train_file="rows.jsonl", loss_over=over)
        batch = data.collate_train(data.train)
        with torch.no_grad():
            losses[over] = LanguageModelLoss(model)(batch)
    rows = [torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in data.train]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(data.train):
        labels[index, len(row["prompt_ids"]) : len(rows[index])] = rows[index][len(row["prompt_ids"]) :]
    with torch.no_grad():
        expected = model(
            input_ids=ids, attention_mask=torch.stack([torch.arange(ids.shape[1]) < len(row) for row in rows]).long(), labels=labels
        )
    assert losses["tokens"].mean() == pytest.approx(float(expected.loss), rel=1e-5)
    assert losses["examples"].mean() != pytest.approx(float(expected.loss), rel=1e-3)


def test_output_gradients_are_those_of_the_loss_over_tokens(tokenizer, tmp_path):
    texts = [" great", " a really good film", " terrible"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "the film is", "completion": text}) + "\n" for text in texts))
    model = AutoModelForCausalLM.from_pretrained("my-model").eval()
    data = prepare(tokenizer, model.config, train_file="rows.jsonl", loss_over="tokens")
    batch, inputs = data.collate_train(data.train), []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: args[0].retain_grad() or inputs.append(args[0]))
    with recording() as recorder:
        LanguageModelLoss(model)(batch).sum().backward()
    handle.remove()
    recorded = torch.cat(recorder.gradients)
    states = inputs[0].grad * inputs[0].detach().square().mean(dim=2, keepdim=True).sqrt()  # of states of size one
    expected = states[torch.arange(len(states)).unsqueeze(1), batch["positions"]].flatten(0, 1)[(batch["targets"] >= 0).flatten()]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(recorded[recorded.any(dim=1)], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert int(states.any(dim=2).sum()) == len(expected)


def test_each_example_gets_demonstrations_of_its_own(tokenizer):
    def prompts(seed: int, number: int | None = None) -> list[str]:
        options = {"num_demonstrations": 1, "demonstrations_per": "example", "num_eval": number, "seed": seed, "parts": ("eval",)}
        data = prepare(tokenizer, task="sst2", data_dir="data", **options)
        return [tokenizer.decode(row["prompt_ids"]) for row in data.eval]

    found = prompts(0)
    demonstrations = {text.partition("\n\n")[0].partition("This movie is")[0] for text in found}
    assert len(demonstrations) > len(found) / 2
    assert found == prompts(0) and set(prompts(0, 5)) <= set(found) and found != prompts(1)


def test_a_prompt_starts_with_the_given_token(tokenizer):
    usual, other = (prepare(tokenizer, task="sst2", data_dir="data", bos_token=token).train[0]["prompt_ids"] for token in (None, "great"))
    assert other == [tokenizer.convert_tokens_to_ids("great"), *usual[1:]] != usual


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_over": "tokens", "objective": "choices"}, "loss_over='tokens' is 'examples', or with the objective 'lm' 'tokens'"),
        ({"demonstrations_per": "example"}, "demonstrations_per='example' is 'run', or with num_demonstrations 'example'"),
        ({"bos_token": "nowhere"}, "--bos_token 'nowhere' is no token of the tokenizer"),
    ],
)
def test_what_would_do_nothing_is_refused(tokenizer, options, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        prepare(tokenizer, task="sst2", data_dir="data", **options)
