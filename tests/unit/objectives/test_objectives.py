"""Losses: gathered scoring equals scoring by hand, whatever the model, the padding or the form of the batch."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from zotune.objectives.losses import AccuracyLoss, ChoiceLoss, ClassifierLoss, LanguageModelLoss, choice_scores, objective, token_logprobs
from zotune.objectives.token_logprobs import cross_entropy, log_normalizers
from zotune.tasks import ChoicesCollator, LanguageModelCollator

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large enough that every token matters
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-separate": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        init_std=0.3,
    ),
    "gemma2-softcap": lambda: Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0),
    "cohere-scale": lambda: CohereConfig(**LLAMA, logit_scale=0.25),
}  # fmt: skip


def random_model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama-tied")


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def single_token_examples() -> list[dict]:
    return [{"prompt_ids": ids(length, length), "option_ids": [[5], [17], [40]], "answer": length % 3} for length in (4, 11, 7)]


def mixed_examples() -> list[dict]:
    """Options of one to three tokens, and one example with an option fewer."""
    return [
        {"prompt_ids": ids(6, 1), "option_ids": [[5], [17, 8], [40, 41, 42]], "answer": 1},
        {"prompt_ids": ids(9, 2), "option_ids": [[9, 3], [10]], "answer": 0},
    ]


@torch.no_grad()
def logprob_by_hand(model: nn.Module, prompt: list[int], option: list[int]) -> float:
    """Sum over the option's tokens of the full-vocabulary log softmax, one unpadded row, nothing gathered."""
    logits = model(input_ids=torch.tensor([prompt + option])).logits[0].float()
    table = logits.log_softmax(dim=-1)
    return sum(table[len(prompt) + i - 1, token].item() for i, token in enumerate(option))


def scores_by_hand(model, examples) -> torch.Tensor:
    most = max(len(example["option_ids"]) for example in examples)
    table = torch.full((len(examples), most), float("-inf"))
    for row, example in enumerate(examples):
        for column, option in enumerate(example["option_ids"]):
            table[row, column] = logprob_by_hand(model, example["prompt_ids"], option)
    return table


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_logprobs_equal_the_ungathered_computation(model):
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, VOCABULARY, (5, 12), generator=generator)
    positions = torch.randint(0, 12, (5, 4), generator=generator)
    targets = torch.randint(0, VOCABULARY, (5, 4), generator=generator)
    targets[2, 1] = -100
    mask = torch.ones_like(input_ids)
    table = model(input_ids=input_ids, attention_mask=mask).logits.float().log_softmax(-1)
    expected = table[torch.arange(5)[:, None], positions].gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected[2, 1] = 0.0
    close(token_logprobs(model, input_ids, mask, positions, targets), expected)


@torch.no_grad()
def test_the_single_token_form_equals_the_general_form(model):
    examples = single_token_examples()
    fast = ChoicesCollator(pad_token_id=0)(examples)
    general = ChoicesCollator(pad_token_id=0, single_token_form=False)(examples)
    assert "option_ids" in fast and "option_ids" not in general
    expected = scores_by_hand(model, examples)
    close(choice_scores(model, fast), expected)
    close(choice_scores(model, general), expected)


@torch.no_grad()
def test_options_of_several_tokens_equal_scores_by_hand(model):
    batch = ChoicesCollator(pad_token_id=0, shared_prompt=False)(mixed_examples())
    assert batch["input_ids"].shape[:2] == batch["option_mask"].shape == (2, 3)
    close(choice_scores(model, batch), scores_by_hand(model, mixed_examples()))


@torch.no_grad()
def test_length_normalized_scores_are_means_over_option_tokens(llama):
    batch = ChoicesCollator(pad_token_id=0)(mixed_examples()[:1])
    expected = scores_by_hand(llama, mixed_examples()[:1]) / torch.tensor([[1, 2, 3]])
    close(choice_scores(llama, batch, length_normalize=True), expected)


@torch.no_grad()
def test_the_lm_loss_averages_each_examples_scored_tokens(model):
    examples = [
        {"prompt_ids": ids(5, 8), "completion_ids": ids(3, 9)},
        {"prompt_ids": ids(2, 10), "completion_ids": ids(7, 11)},
    ]
    losses = LanguageModelLoss(model)(LanguageModelCollator(pad_token_id=0)(examples))
    by_hand = [
        -logprob_by_hand(model, example["prompt_ids"], example["completion_ids"]) / len(example["completion_ids"]) for example in examples
    ]
    assert losses.shape == (2,)
    close(losses, torch.tensor(by_hand))


@torch.no_grad()
def test_a_completion_mask_leaves_tokens_out_of_the_loss(llama):
    prompt, completion = ids(5, 1), ids(4, 2)
    masked = {"prompt_ids": prompt, "completion_ids": completion, "completion_mask": [False, False, True, True]}
    plain = {"prompt_ids": prompt + completion[:2], "completion_ids": completion[2:]}
    collate = LanguageModelCollator(pad_token_id=0)
    close(LanguageModelLoss(llama)(collate([masked])), LanguageModelLoss(llama)(collate([plain])))


@torch.no_grad()
def test_language_model_loss_of_an_answer_is_its_negative_score(model):
    examples = single_token_examples()
    losses = LanguageModelLoss(model)(LanguageModelCollator(pad_token_id=0)(examples))
    scores = choice_scores(model, ChoicesCollator(pad_token_id=0)(examples))
    close(losses, -scores[torch.arange(3), torch.tensor([e["answer"] for e in examples])])


@torch.no_grad()
@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("pad", [0, 55])
def test_padding_changes_no_loss(model, pad, multiple):
    for examples in (single_token_examples(), mixed_examples()):
        for loss, collator in ((ChoiceLoss, ChoicesCollator), (LanguageModelLoss, LanguageModelCollator)):
            collate = collator(pad_token_id=pad, pad_to_multiple_of=multiple)
            alone = torch.cat([loss(model)(collate([example])) for example in examples])
            together = loss(model)(collate(examples))
            assert together.isfinite().all()
            close(together, alone)
            assert multiple is None or collate(examples)["input_ids"].shape[-1] % multiple == 0


@torch.no_grad()
def test_a_batch_stacked_k_times_has_its_losses_k_times(model):
    for examples in (single_token_examples(), mixed_examples()):
        for loss, collator in ((ChoiceLoss, ChoicesCollator), (LanguageModelLoss, LanguageModelCollator)):
            batch = collator(pad_token_id=0)(examples)
            stacked = {name: torch.cat([value] * 3) for name, value in batch.items()}
            close(loss(model)(stacked), loss(model)(batch).repeat(3))


@torch.no_grad()
def test_choice_loss_is_cross_entropy_over_the_scores(llama):
    batch = ChoicesCollator(pad_token_id=0)(mixed_examples())
    scores = scores_by_hand(llama, mixed_examples())
    close(ChoiceLoss(llama)(batch), -scores.log_softmax(1)[torch.arange(2), batch["answer"]])


@torch.no_grad()
def test_only_scored_hidden_states_go_through_the_head(model):
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    try:
        choice_scores(model, ChoicesCollator(pad_token_id=0)(single_token_examples()))
        LanguageModelLoss(model)(LanguageModelCollator(pad_token_id=0)(mixed_examples()))
    finally:
        handle.remove()
    assert [tuple(shape) for shape in seen] == [(3, 1, 32), (2, 2, 32)]


def test_the_head_has_no_hooks_after_a_forward_that_raises(llama):
    head = llama.get_output_embeddings()
    batch = ChoicesCollator(pad_token_id=0)(single_token_examples())
    choice_scores(llama, batch)
    assert not head._forward_pre_hooks

    def fail(*_):
        raise MemoryError("out of memory")

    handle = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        choice_scores(llama, batch)
    handle.remove()
    assert not head._forward_pre_hooks
    assert llama(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 5, VOCABULARY)


@torch.no_grad()
def test_a_peft_model_scores_as_its_merged_weights_do():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        wrapped = peft.get_peft_model(random_model("llama-separate"), config).eval()
    examples = mixed_examples()
    scores = choice_scores(wrapped, ChoicesCollator(pad_token_id=0)(examples))
    assert not torch.allclose(scores, scores_by_hand(random_model("llama-separate"), examples), atol=1e-2)
    close(scores, scores_by_hand(wrapped.merge_and_unload(), examples))


class FlattenedHead(nn.Module):
    """A language model that feeds its head (rows * time, d): nothing can be gathered before it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        states = self.embedding(input_ids).cumsum(dim=1)
        return (self.head(states.flatten(0, 1)).view(*input_ids.shape, -1),)


class NoHead(FlattenedHead):
    get_output_embeddings = None


@torch.no_grad()
@pytest.mark.parametrize("kind", [FlattenedHead, NoHead])
def test_logits_are_gathered_where_hidden_states_cannot_be(kind):
    model = kind()
    batch = ChoicesCollator(pad_token_id=0)(mixed_examples())
    for row, example in enumerate(mixed_examples()):
        for column, option in enumerate(example["option_ids"]):
            table = model(torch.tensor([example["prompt_ids"] + option]))[0][0].log_softmax(-1)
            start = len(example["prompt_ids"])
            expected = sum(table[start + i - 1, token] for i, token in enumerate(option))
            close(choice_scores(model, batch)[row, column], expected)


@torch.no_grad()
def test_losses_of_bfloat16_logits_are_float32_log_softmax(llama):
    half = random_model("llama-tied").to(torch.bfloat16)
    examples = single_token_examples()
    losses = LanguageModelLoss(half)(LanguageModelCollator(pad_token_id=0)(examples))
    assert losses.dtype == ChoiceLoss(half)(ChoicesCollator(pad_token_id=0)(examples)).dtype == torch.float32
    assert len({loss.item() for loss in losses.bfloat16().float() - losses}) > 1  # not rounded to bfloat16


def test_the_logits_may_be_taken_in_pieces():
    logits, targets = torch.linspace(-3, 3, 70).sin().view(7, 10), torch.tensor([3, 0, -100, 9, 9, 1, 2])
    close(cross_entropy(logits, targets, chunk=25), cross_entropy(logits, targets))
    close(log_normalizers(logits, chunk=25), logits.logsumexp(dim=1))


@torch.no_grad()
def test_classifier_loss_is_the_models_own():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()
    batch = {
        "input_ids": torch.arange(12).view(3, 4),
        "attention_mask": torch.ones(3, 4, dtype=torch.long),
        "token_type_ids": torch.tensor([[0, 0, 1, 1]] * 3),
        "labels": torch.tensor([2, 0, 1]),
    }
    losses = ClassifierLoss(model)(batch)
    assert losses.shape == (3,)
    close(losses.mean(), model(**batch).loss)


def test_objectives_have_names(llama):
    assert isinstance(objective("lm", llama), LanguageModelLoss)
    assert isinstance(objective("choices", llama), ChoiceLoss)
    assert isinstance(objective("accuracy", llama), AccuracyLoss)
    assert isinstance(objective("classifier", llama), ClassifierLoss)
    with pytest.raises(ValueError, match=r"unknown objective 'reward'.*lm, choices, accuracy, classifier"):
        objective("reward", llama)


def test_a_model_without_a_head_is_named():
    body = random_model("llama-tied").model
    with pytest.raises(ValueError, match=r"without logits.*AutoModelForCausalLM"):
        choice_scores(body, ChoicesCollator(pad_token_id=0)(single_token_examples()))


def test_collators_can_be_pickled():
    collate = ChoicesCollator(pad_token_id=7, pad_to_multiple_of=8)
    assert pickle.loads(pickle.dumps(collate)) == collate


@torch.no_grad()
def test_the_accuracy_loss_is_one_where_a_wrong_option_scores_best(llama):
    single = [{"prompt_ids": ids(5, n), "option_ids": [[7], [8], [9]], "answer": n % 3} for n in range(9)]
    words = [{**each, "option_ids": [[7, 8], [9, 10, 11], [12]], "right": [each["answer"], 2]} for each in single]
    for examples in (single, words):
        batch = ChoicesCollator(0)(examples)
        best = choice_scores(llama, batch).argmax(dim=1).tolist()
        right = [example.get("right", [example["answer"]]) for example in examples]
        expected = [float(place not in those) for place, those in zip(best, right, strict=True)]
        assert AccuracyLoss(llama)(batch).tolist() == expected and 0 < sum(expected) < 9
        torch.testing.assert_close(AccuracyLoss(llama).proxy(batch), ChoiceLoss(llama)(batch))
