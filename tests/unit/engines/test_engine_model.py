"""A model that llama.cpp computes gives what the same weights give in torch: logits, packed choices, losses, what hooks see."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_models import VOCABULARY, WIDTH, Pair, choice_batch, text_batch, texts
from zotune import objectives
from zotune.engines.model import EngineModel
from zotune.objectives.output_gradients import recording
from zotune.objectives.packed_choices import option_logprobs, packing_agrees
from zotune.objectives.token_logprobs import IGNORE, scored_logits, token_logprobs
from zotune.subspaces import residual_check
from zotune.subspaces.activation import observing_inputs

Opened = Callable[..., EngineModel]
LENGTHS = [5, 1, 12, 7]


@pytest.fixture(params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


@pytest.fixture
def any_model(pair: Pair, model: EngineModel, opened: Opened, request: pytest.FixtureRequest) -> EngineModel:
    return opened(pair) if "qwen2" in request.node.name else model


def close(found: Tensor, expected: Tensor, size: float = 1e-4) -> None:
    assert float((found - expected).abs().max()) <= size * float(expected.abs().max())


@torch.no_grad()
def expected_logits(pair: Pair, batch: dict[str, Tensor]) -> Tensor:
    places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return pair.torch(**batch, position_ids=places).logits


# -- logits ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_logits_equal_those_of_transformers(pair: Pair, any_model: EngineModel, left: bool) -> None:
    batch = texts(LENGTHS, left=left)
    real = batch["attention_mask"] > 0
    found, expected = any_model(**batch).logits, expected_logits(pair, batch)
    close(found[real], expected[real])
    assert not found[~real].any()


def test_scored_positions_may_repeat_and_come_in_any_order(llama: Pair, model: EngineModel) -> None:
    batch = texts(LENGTHS)
    positions = torch.tensor([[4, 0, 4], [0, 0, 0], [11, 3, 5], [6, 6, 1]])
    found = model.scored_logits(batch, positions)
    close(found, expected_logits(llama, batch)[torch.arange(4).unsqueeze(1), positions])
    assert torch.equal(found[0, 0], found[0, 2]) and torch.equal(found[3, 0], found[3, 1])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_position_on_padding_gives_the_first_tokens_logits(model: EngineModel, left: bool) -> None:
    batch = texts(LENGTHS, left=left)
    first = batch["attention_mask"].argmax(dim=1)
    padding = batch["attention_mask"].argmin(dim=1)
    found = model.scored_logits(batch, torch.stack([padding, first], dim=1))
    assert torch.equal(found[:, 0], found[:, 1])


def test_position_ids_may_begin_anywhere(llama: Pair, model: EngineModel) -> None:
    batch = texts([6, 6])
    ids = torch.tensor([range(6), range(40, 46)])
    with torch.no_grad():
        expected = llama.torch(**batch, position_ids=ids).logits
    close(model(**batch, position_ids=ids).logits, expected)


def test_the_whole_vocabulary_and_no_mask_are_fine(llama: Pair, model: EngineModel) -> None:
    ids = torch.arange(VOCABULARY).view(2, -1)
    with torch.no_grad():
        close(model(ids).logits, llama.torch(ids).logits)


def test_a_quantized_file_gives_its_weights_logits(llama_q8: Pair, opened: Opened) -> None:
    other = opened(llama_q8)
    batch = texts([9, 9])
    close(other(**batch).logits, expected_logits(llama_q8, batch), 0.05)  # llama.cpp rounds activations to 8 bits too
    rows, weight = other.get_output_embeddings().rows(torch.tensor([[3, 95], [0, 3]])), llama_q8.torch.lm_head.weight.detach()
    assert torch.equal(rows, weight[torch.tensor([[3, 95], [0, 3]])])
    weights = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    close(other.get_output_embeddings().product(weights), weights @ weight, 1e-5)


def test_parameters_are_matrices_under_checkpoint_names(llama: Pair, model: EngineModel) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in llama.fresh().named_parameters() if p.requires_grad}
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())


# -- what it cannot compute ------------------------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_computed_are_named(model: EngineModel) -> None:
    with pytest.raises(ValueError, match=r"a text has 321 tokens, and the context takes 320: .*--max_length\.$"):
        model(**texts([4, 321]))
    with pytest.raises(ValueError, match="a row of the batch has no token"):
        model(**texts([4, 0]))
    with pytest.raises(ValueError, match="position_ids skip or repeat"):
        model(torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 1, 3]]))
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is none of the model's {VOCABULARY} tokens"):
        model(torch.tensor([[5, VOCABULARY]]))
    assert model(**texts([320])).logits.isfinite().all()


# -- packed choices --------------------------------------------------------------------------------------------------------------------


def packed_batch(prompts: list[int], options: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Prompts of these lengths, each with options of these lengths after it, in one row each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    most, longest = max(map(len, options)), max(max(row) for row in options)
    for prompt, lengths in zip(prompts, options, strict=True):
        ids = torch.randint(1, VOCABULARY, (prompt + sum(lengths),), generator=generator).tolist()
        segments, places = [0] * prompt, list(range(prompt))
        positions, of, targets, own = [prompt - 1], [], [], []
        start = prompt
        for number, length in enumerate(lengths, 1):
            segments += [number] * length
            places += range(prompt, prompt + length)
            first = len(positions)
            positions += range(start, start + length - 1)
            of.append([0, *range(first, first + length - 1)] + [0] * (longest - length))
            targets.append(ids[start : start + length] + [IGNORE] * (longest - length))
            own.append([*range(prompt), *range(start, start + length)] + [-1] * (longest - length))
            start += length
        empty = most - len(lengths)
        of += [[0] * longest] * empty
        targets += [[IGNORE] * longest] * empty
        own += [own[0]] * empty
        rows.append((ids, segments, places, positions, of, targets, own))

    def padded(which: int, value: int) -> Tensor:
        width = max(len(row[which]) for row in rows)
        return torch.tensor([row[which] + [value] * (width - len(row[which])) for row in rows])

    batch = {"input_ids": padded(0, 0), "segments": padded(1, -1), "position_ids": padded(2, 0), "positions": padded(3, prompts[0] - 1)}
    width = max(len(own) for row in rows for own in row[6])
    owned = [[own + [-1] * (width - len(own)) for own in row[6]] for row in rows]
    batch |= {"places": torch.tensor([row[4] for row in rows]), "targets": torch.tensor([row[5] for row in rows])}
    batch["positions"] = torch.where(batch["segments"].gather(1, batch["positions"]) >= 0, batch["positions"], 0)
    return batch | {"own_rows": torch.tensor(owned)}


def in_own_rows(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities (B, C, S) of options in rows of their own."""
    own = batch["own_rows"]
    ids = batch["input_ids"].unsqueeze(1).expand(-1, own.shape[1], -1).gather(2, own.clamp_min(0))
    mask = (own >= 0).long()
    length = (batch["targets"] != IGNORE).sum(dim=2)
    start = mask.sum(dim=2) - length
    positions = (start.unsqueeze(2) - 1 + torch.arange(batch["targets"].shape[2])).clamp_max(ids.shape[2] - 1)
    found = token_logprobs(model, *(tensor.flatten(0, 1) for tensor in (ids, mask, positions, batch["targets"])))
    return found.view(batch["targets"].shape)


@pytest.mark.parametrize("n_ubatch", [1024, 32])
@pytest.mark.filterwarnings("error")
def test_packed_options_equal_those_in_rows_of_their_own(llama: Pair, model: EngineModel, opened: Opened, n_ubatch: int) -> None:
    batch = packed_batch([7, 3, 11], [[2, 3, 1], [4, 1], [5, 5, 12]])
    other = model if n_ubatch == 1024 else opened(llama, n_ubatch=n_ubatch)
    packed, separate = option_logprobs(other, batch), in_own_rows(other, batch)
    with torch.no_grad():
        expected = in_own_rows(llama.torch, batch)
    close(packed, expected)
    close(separate, expected)
    assert (packed[batch["targets"] == IGNORE] == 0).all()


def test_more_options_than_sequences_are_evaluated_in_parts(llama: Pair, model: EngineModel) -> None:
    rows = [[1] * 20 for _ in range(30)]  # 600 in a batch
    rows[0] = [1, 2] * 150 + [1]  # 301 of one prompt, and llama.cpp takes 256
    batch = packed_batch([4] * 30, rows)
    packing_agrees[model] = True  # no comparison of each option
    with torch.no_grad():
        close(option_logprobs(model, batch), in_own_rows(llama.torch, batch))


# -- losses and output gradients -------------------------------------------------------------------------------------------------------


def losses(model: torch.nn.Module, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, output gradients, their examples)."""
    with torch.no_grad(), recording() as recorder:
        if kind == "lm":
            found = objectives.LanguageModelLoss(model)(text_batch(LENGTHS))
        else:
            found = objectives.ChoiceLoss(model)(choice_batch(LENGTHS))
    return found, torch.cat(recorder.gradients), torch.cat(recorder.examples)


@pytest.mark.parametrize("kind", ["lm", "choices"])
def test_losses_and_output_gradients_equal_torchs(pair: Pair, any_model: EngineModel, kind: str) -> None:
    found, expected = losses(any_model, kind), losses(pair.torch, kind)
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert torch.equal(found[2], expected[2]) and found[1].shape[1] == WIDTH


def test_every_layer_passes_the_residual_check_as_in_torch(llama: Pair, model: EngineModel) -> None:
    def verdict(subject: torch.nn.Module) -> tuple[dict[str, float], residual_check.Verdict]:
        layers = {m: n for n, m in subject.named_modules() if n.endswith(("o_proj", "down_proj"))}
        loss = objectives.LanguageModelLoss(subject)

        def calls():
            yield loss(text_batch(LENGTHS))
            yield loss(text_batch([9, 2, 4], seed=1))

        with torch.no_grad():
            return residual_check.gains(layers, calls, 64, 0, 0)[0], residual_check.verify(layers, calls, 64, 0, 0)

    (found, judged), (expected, _) = verdict(model), verdict(llama.torch)
    assert judged.rejected == [] and judged.constant_factors
    assert found == pytest.approx(expected, rel=0.05)


# -- hooks -----------------------------------------------------------------------------------------------------------------------------


def seen_inputs(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of all matrices of the blocks, by name."""
    names = {m: n for n, m in model.named_modules() if n.endswith("_proj")}
    found: dict[str, Tensor] = {}
    with torch.no_grad(), observing_inputs(names, lambda module, args: found.__setitem__(names[module], args[0])):
        scored_logits(model, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["positions"])
    return found


@pytest.mark.parametrize("n_ubatch", [1024, 32], ids=["one", "parts"])
def test_hooks_see_the_inputs_that_torch_has(llama: Pair, model: EngineModel, opened: Opened, n_ubatch: int) -> None:
    batch = choice_batch([*LENGTHS, 75], seed=2)  # the last text is longer than a part
    found, expected = seen_inputs(model if n_ubatch == 1024 else opened(llama, n_ubatch=n_ubatch), batch), seen_inputs(llama.torch, batch)
    real = batch["attention_mask"].bool()
    last = torch.zeros_like(real).scatter_(1, batch["positions"], True)
    assert found.keys() == expected.keys()
    for name, inputs in found.items():
        behind = name.startswith("model.layers.1.mlp")
        shown = last if behind else real  # nothing else is computed behind the last attention
        close(inputs[shown], expected[name][shown])
        assert not inputs[~shown].any(), name


@pytest.mark.parametrize("most_logits", [2**24, 0])
def test_a_large_vocabulary_samples_the_last_layer_where_it_is_scored(model: EngineModel, most_logits: int) -> None:
    names = {model.matrices[f"model.layers.{block}.mlp.down_proj"]: block for block in (0, 1)}
    sampled, scored = dict[int, Tensor](), dict[int, Tensor]()
    model.most_logits = most_logits

    def see(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        sampled[names[module]], scored[names[module]] = recorder.sampled_rows(args[0]), recorder.scored_rows(args[0])

    with torch.no_grad(), recording(8) as recorder, observing_inputs(names, see):
        objectives.ChoiceLoss(model)(choice_batch([9, 12, 7], seed=2))
    assert all(rows.any(dim=1).all() for rows in sampled.values())
    assert len(sampled[0]) > len(scored[0]) == 3
    assert len(sampled[1]) == (len(sampled[0]) if most_logits else 3)


def test_matrices_with_one_input_get_the_same_tensor(model: EngineModel) -> None:
    found = seen_inputs(model, choice_batch(LENGTHS))
    same = [[name.rsplit(".")[-1] for name in found if found[name] is one] for one in {id(x): x for x in found.values()}.values()]
    assert sorted(map(sorted, same)) == sorted(2 * [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]])
    neighbors = [id(x) for x in found.values()]
    assert sum(a != b for a, b in itertools.pairwise(neighbors)) == len(same) - 1  # one after the other


@pytest.mark.parametrize("n_ubatch", [1024, 32], ids=["one", "parts"])
def test_a_changed_output_has_the_effect_that_it_has_in_torch(llama: Pair, model: EngineModel, opened: Opened, n_ubatch: int) -> None:
    batch = choice_batch([*LENGTHS, 75])
    change = 0.3 * torch.randn(*batch["input_ids"].shape, WIDTH, generator=torch.Generator().manual_seed(0))

    def logits(subject: torch.nn.Module) -> Tensor:
        layers = [m for n, m in subject.named_modules() if n.endswith(("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"))]
        add = lambda module, args, output: output + change.view(output.shape)  # noqa: E731
        handles = [layer.register_forward_hook(add) for layer in layers]
        with torch.no_grad():
            found = scored_logits(subject, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["positions"])
        for handle in handles:
            handle.remove()
        return found

    subject = model if n_ubatch == 1024 else opened(llama, n_ubatch=n_ubatch)
    before = logits_of(subject, batch)
    changed = logits(subject)
    close(changed, logits(llama.torch))
    assert float((changed - before).abs().max()) > 0.1
    assert torch.equal(logits_of(subject, batch), before)
    assert all(layer.computed.numel() == 0 for layer in subject.matrices.values())


def logits_of(model: EngineModel, batch: dict[str, Tensor]) -> Tensor:
    return model.scored_logits(batch, batch["positions"])


def test_watching_changes_no_bit(model: EngineModel) -> None:
    batch = choice_batch(LENGTHS)
    before = logits_of(model, batch)
    with observing_inputs([m for n, m in model.named_modules() if n.endswith("_proj")], lambda module, args: None):
        assert torch.equal(logits_of(model, batch), before)
