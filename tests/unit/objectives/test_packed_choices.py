"""Options that share their prompt in one row score what they score each in a row of its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

import toys
from batching import agree
from zotune import ZerothOrder, methods, objectives
from zotune.objectives import packed_choices
from zotune.objectives.losses import ChoiceLoss, choice_scores
from zotune.objectives.packed_choices import is_packed
from zotune.tasks import ChoicesCollator

DECODERS = ("llama", "opt", "gpt2", "qwen2")
packed, apart = ChoicesCollator(pad_token_id=1), ChoicesCollator(pad_token_id=1, shared_prompt=False)


def examples(*lengths: tuple[int, list[int]], seed: int = 0) -> list[dict]:
    """One for each (tokens of the prompt, tokens of the options)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(4, 60, (count,), generator=generator).tolist()

    return [{"prompt_ids": ids(prompt), "option_ids": [ids(o) for o in options], "answer": 0} for prompt, options in lengths]


UNEVEN = ((6, [3, 1, 4]), (11, [2, 5]), (3, [1]))


def tokens_seen(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the token ids of each forward that scoring a batch takes."""
    shapes = []
    handle = model.register_forward_pre_hook(lambda _m, _args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    choice_scores(model, batch)
    handle.remove()
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_scores_are_those_of_a_row_an_option(name, attention):
    model = toys.transformer(name, attn_implementation=attention).eval()
    for seed in range(3):
        rows = examples(*UNEVEN, seed=seed)
        scores, expected = choice_scores(model, packed(rows)), choice_scores(model, apart(rows))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        normal, other = (choice_scores(model, collate(rows), length_normalize=True) for collate in (packed, apart))
        torch.testing.assert_close(normal, other, rtol=1e-4, atol=1e-4)
    assert packed_choices.packing_agrees[model]
    assert tokens_seen(model, packed(rows)) == [(3, 16)]  # the second: 11 of the prompt, 1 + 4 of the options


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECODERS)
def test_in_half_precision_the_scores_agree_as_far_as_it_goes(name, dtype):
    # The weights of the other tests make losses of a hundred nats, in which half precision leaves whole nats open.
    model = toys.transformer(name, dtype).eval()
    for parameter in model.parameters():
        parameter.mul_(0.4 if parameter.dim() > 1 else 1)
    rows = examples(*UNEVEN)
    torch.testing.assert_close(choice_scores(model, packed(rows)), choice_scores(model, apart(rows)), rtol=2e-2, atol=2e-2)
    assert packed_choices.packing_agrees[model]


@pytest.mark.parametrize("per", [{}, {"num_directions": 3}, {"directions_per": "example"}, {"directions_per": "group", "group_size": 2}])
@pytest.mark.parametrize("name", DECODERS)
def test_batched_and_sequential_coefficients_are_equal(name, per):
    batch = packed(examples((6, [3, 1, 4]), (11, [2, 5]), (5, [4, 2, 2])))
    method = methods.lozo(eps=1e-2, **per)
    assert is_packed(batch)
    assert agree(lambda: toys.transformer(name), lambda model: objectives.objective("choices", model), batch, method)


def test_a_steps_coefficients_do_not_depend_on_the_form():
    found = []
    for collate in (packed, apart):
        model = toys.transformer("llama")
        optimizer = ZerothOrder(model, methods.lozo(directions_per="example", eps=1e-2), lr=1e-3)
        optimizer.step(ChoiceLoss(model), collate(examples((6, [3, 4]), (11, [2, 5]))))
        found.append(optimizer.last_report.coefficients)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_compared_batch_scores_bit_for_bit_as_later_ones():
    """Else a resumed run, whose first batch is another, would not be the run that was not stopped."""
    model, batch = toys.transformer("llama").eval(), packed(examples(*UNEVEN))
    first = choice_scores(model, batch)
    assert torch.equal(first, choice_scores(model, batch))


@torch.no_grad()
def test_the_comparison_runs_at_most_as_many_rows_as_examples():
    model, batch = toys.transformer("llama").eval(), packed(examples(*UNEVEN))
    assert tokens_seen(model, batch) == [(3, 15)] * 3 + [(3, 16)] * 2
    assert tokens_seen(model, batch) == [(3, 16)]


@torch.no_grad()
def test_the_head_sees_a_prompts_last_state_once():
    model, rows, seen = toys.transformer("llama").eval(), examples((6, [3, 1, 4]), (11, [2, 5, 1])), []
    choice_scores(model, packed(rows))
    handle = model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:2]))
    choice_scores(model, packed(rows))
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(2, 1 + 2 + 0 + 3)]


class Careless(LlamaForCausalLM):
    """Ignores one of the two things that keep options apart, or stumbles over it."""

    ignores = ""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            if self.ignores == "mask":
                attention_mask = None
            if self.ignores == "nothing":
                raise RuntimeError("only two dimensions here")
        return super().forward(input_ids, attention_mask, None if self.ignores == "positions" else position_ids, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignores", ["mask", "positions", "nothing"])
def test_a_model_that_cannot_pack_is_warned_of_once(ignores, dtype):
    model = toys.transformer("llama", dtype).eval()
    model.__class__, model.ignores = Careless, ignores
    rows = examples(*UNEVEN)
    expected = choice_scores(model, apart(rows))
    message = "only two dimensions" if ignores == "nothing" else "log-probability differs by"
    with pytest.warns(UserWarning, match=f"the answer options of Careless cannot share their prompt: .*{message}") as caught:
        scores = choice_scores(model, packed(rows))
    assert len(caught) == 1
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(choice_scores(model, packed(rows)), expected, rtol=tolerance, atol=tolerance)
    assert tokens_seen(model, packed(rows)) == [(9, 15)]


@torch.no_grad()
def test_attention_that_takes_no_such_mask_is_not_given_one(monkeypatch):
    monkeypatch.setattr(packed_choices, "_MASKS", {})
    model, rows = toys.transformer("llama").eval(), examples(*UNEVEN)
    torch.testing.assert_close(choice_scores(model, packed(rows)), choice_scores(model, apart(rows)))
    assert tokens_seen(model, packed(rows)) == [(9, 15)]


@torch.no_grad()
def test_a_sliding_window_keeps_its_meaning():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(vocab_size=60, sliding_window=12, initializer_range=0.3, **sizes)).eval()
    short, long = examples((6, [3, 3])), examples((9, [4, 5]))
    for rows, shape in ((short, (1, 10)), (long, (2, 13))):
        torch.testing.assert_close(choice_scores(model, packed(rows)), choice_scores(model, apart(rows)), rtol=1e-4, atol=1e-4)
        assert tokens_seen(model, packed(rows)) == [shape]


@torch.no_grad()
def test_packing_is_unchecked_under_dropout_or_non_finite_losses():
    rows = examples(*UNEVEN)
    model = toys.transformer("opt").train()
    choice_scores(model, packed(rows))
    assert model not in packed_choices.packing_agrees
    model = toys.transformer("opt").eval()
    model.lm_head.weight.fill_(float("inf"))
    assert not choice_scores(model, packed(rows))[0].isfinite().any()
    assert model not in packed_choices.packing_agrees
    model, rows = toys.transformer("opt").eval(), examples((6, [3, 1]), (8, [2, 1]))
    torch.testing.assert_close(choice_scores(model, packed(rows)), choice_scores(model, apart(rows)), rtol=1e-4, atol=1e-4)
    assert model not in packed_choices.packing_agrees


@torch.no_grad()
def test_single_token_options_of_any_number_are_one_row():
    model, rows = toys.transformer("gpt2").eval(), examples((6, [1, 1, 1]), (9, [1, 1]))
    assert is_packed(packed(rows)) and tokens_seen(model, packed(rows)) == [(2, 9)]
    torch.testing.assert_close(choice_scores(model, packed(rows)), choice_scores(model, apart(rows)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_one_option_says_does_not_reach_another():
    model, rows = toys.transformer("qwen2").eval(), examples((6, [3, 4]), (9, [2, 4]))
    before = choice_scores(model, packed(rows))
    rows[0]["option_ids"][0] = rows[0]["option_ids"][0][::-1]
    after = choice_scores(model, packed(rows))
    assert torch.equal(before[1], after[1]) and before[0, 0] != after[0, 0]
    torch.testing.assert_close(before[0, 1], after[0, 1])


# -- which form ---------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_fed_once_where_that_saves_tokens():
    copa, reading = [(20, [8, 8])] * 4, [(200, [5, 3, 8])] * 4
    assert packed(examples(*copa))["input_ids"].numel() == 4 * 34 and apart(examples(*copa))["input_ids"].numel() == 4 * 54
    assert packed(examples(*reading))["input_ids"].numel() == 4 * 213 and apart(examples(*reading))["input_ids"].numel() == 4 * 621


@pytest.mark.parametrize(
    "lengths",
    [
        [(20, [1, 1])] * 4,  # one token each: the prompt's row scores them all
        [(20, [4])] * 4,  # nothing to share
        [(0, [4, 4])] * 2,  # no prompt
        [(1, [60, 1, 1])] * 2 + [(300, [1, 1, 1])],  # no more tokens either way, and the longer row pays more attention
        [(3, [900] * 8)],  # attention over the other options' places costs more than the prompt
    ],
)
def test_where_it_saves_nothing_the_other_forms_stay(lengths):
    batch = packed(examples(*lengths))
    if lengths[-1][0] == 300:
        assert is_packed(batch)
    else:
        assert not is_packed(batch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=5)), min_size=1, max_size=4))
def test_a_packed_batch_is_never_more_tokens(lengths):
    rows = examples(*lengths)
    batch, plain = packed(rows), apart(rows)
    assert batch["input_ids"].numel() <= plain["input_ids"].numel()
    if is_packed(batch):
        assert batch["input_ids"].shape == (len(lengths), max(p + sum(o) - len(o) for p, o in lengths))
        assert len({tensor.shape[0] for tensor in batch.values()}) == 1  # so that it can be stacked
        # the rows an option would have of its own are those of the other form
        ids = batch["input_ids"].gather(1, batch["own_rows"].clamp(min=0).flatten(1)).view(batch["own_rows"].shape)
        real = batch["own_rows"] >= 0
        mine = batch["option_mask"].unsqueeze(2)
        assert torch.equal((real & mine).long(), plain["attention_mask"] * mine)
        assert torch.equal(ids * (real & mine), plain["input_ids"] * plain["attention_mask"] * mine)
        assert torch.equal(batch["targets"], plain["targets"])


def test_no_warning_in_an_ordinary_run():
    model = toys.transformer("opt")
    optimizer = ZerothOrder(model, methods.lozo(directions_per="example"), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            optimizer.step(ChoiceLoss(model), packed(examples((6, [3, 4]), (11, [2, 5]), seed=seed)))
    assert optimizer.evaluator.batched
