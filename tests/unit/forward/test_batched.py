"""Batched evaluation: one forward of stacked rows gives the losses of one point after the other."""

from __future__ import annotations

import collections
import copy
import warnings

import pytest
import torch
from torch import nn

import toys
from batching import agree
from zotune import ZerothOrder, methods, objectives
from zotune.errors import NotBatchableError
from zotune.forward.batches import Assignment, assign_directions, assigned_layout, batch_rows, shared_layout, take_rows
from zotune.methods.estimators import ESTIMATORS, Point
from zotune.rng.directions import GROUPED_NUMEL, Directions, Key, group_of
from zotune.subspaces import FullCoordinate
from zotune.subspaces.coordinate import Offset

OWN = ({"directions_per": "example"}, {"directions_per": "group", "group_size": 2})


@pytest.mark.parametrize("name", toys.ARCHITECTURES)
@pytest.mark.parametrize("directions", [{"num_directions": 1}, {"num_directions": 3}, *OWN])
def test_batched_and_sequential_coefficients_are_equal(name, directions):
    method = methods.lozo(eps=1e-2, **directions)
    assert agree(lambda: toys.transformer(name), toys.transformer_loss, toys.tokens(4), method)


@pytest.mark.parametrize("directions", [{"num_directions": 1}, {"num_directions": 3}, OWN[0]])
@pytest.mark.parametrize("direction", Directions.KINDS)
def test_forward_differences_and_other_distributions_too(directions, direction):
    method = methods.lozo(eps=1e-2, estimator="forward", direction=direction, rank=3, **directions)
    assert agree(toys.classifier, toys.loss_function, toys.batch(6), method)


@pytest.mark.parametrize("directions", [{"num_directions": 2}, *OWN])
def test_bfloat16_agrees_as_far_as_its_losses_are_exact(directions):
    method = methods.lozo_m(eps=1e-1, **directions)
    assert agree(lambda: toys.classifier(torch.bfloat16), toys.loss_function, toys.batch(6), method, tolerance=5e-2)


@pytest.mark.parametrize("directions", [{"num_directions": 1}, OWN[0]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_adapters_in_full_space(name, directions):
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}[name]
            model = peft.get_peft_model(toys.transformer(name), peft.LoraConfig(r=4, target_modules=targets))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
        return model

    assert agree(build, toys.transformer_loss, toys.tokens(4), methods.mezo(eps=1e-2, **directions))
    assert agree(build, toys.transformer_loss, toys.tokens(4), methods.lozo(eps=1e-2, rank=2, **directions))


def choice_batch(options: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (4, options, 7)
    return {
        "input_ids": torch.randint(4, 60, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "positions": torch.tensor([4, 5]).expand(4, options, 2).contiguous(),
        "targets": torch.randint(4, 60, (4, options, 2), generator=generator),
        "option_mask": torch.ones(4, options, dtype=torch.bool),
        "answer": torch.tensor([0, 1, 1, 0]),
    }


@pytest.mark.parametrize("directions", [{"num_directions": 1}, OWN[0]])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_losses_of_answer_options_which_flatten_into_the_rows(name, directions):
    method = methods.lozo(eps=1e-2, **directions)
    assert agree(lambda: toys.transformer(name), lambda model: objectives.objective("choices", model), choice_batch(2), method)


@pytest.mark.parametrize("directions", [{"num_directions": 1}, OWN[0]])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_losses_of_a_classifier(name, directions):
    import transformers

    def build() -> nn.Module:
        torch.manual_seed(0)
        encoder = toys.transformer(name)
        head = {"bert": transformers.BertForSequenceClassification, "roberta": transformers.RobertaForSequenceClassification}[name]
        model = head(encoder.config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(6)
        return model

    ids = toys.tokens(4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    method = methods.lozo(eps=1e-2, **directions)
    assert agree(build, lambda model: objectives.objective("classifier", model), batch, method)


def test_norms_written_in_python():
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1, 6)), nn.Parameter(torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return normal * (1.0 + self.weight.float()) + self.bias.to(x.dtype)

    assert agree(Norm, lambda model: lambda x: model(x).sin().sum(dim=(1, 2)), torch.randn(4, 3, 6), methods.mezo(eps=1e-2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_batched_forward_that_raises_leaves_every_bit(error):
    model = toys.transformer("gpt2")
    optimizer = ZerothOrder(model, methods.lozo(directions_per="example"), lr=1e-3, forward_batching="batched")
    loss, ids = toys.transformer_loss(model), toys.tokens(4)
    optimizer.step(loss, ids)
    before, stored = copy.deepcopy(model.state_dict()), {n: p.detach().clone() for n, p in model.named_parameters()}
    tables = [module._parameters for module in model.modules()]

    def broken(batch: torch.Tensor) -> torch.Tensor:
        loss(batch)
        raise error("after the forward")

    with pytest.raises(error):
        optimizer.step(broken, ids)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(stored[name], value) for name, value in model.named_parameters())
    assert all(module._parameters is table for module, table in zip(model.modules(), tables, strict=True))
    optimizer.step(loss, ids)


def test_a_step_after_the_first_is_one_forward():
    model, rows = toys.transformer("llama"), []
    loss = toys.transformer_loss(model)
    optimizer = ZerothOrder(model, methods.lozo(num_directions=3), lr=1e-3)

    def counted(batch: torch.Tensor) -> torch.Tensor:
        rows.append(len(batch))
        return loss(batch)

    optimizer.step(counted, toys.tokens(4))
    rows.clear()
    optimizer.step(counted, toys.tokens(4))
    assert rows == [24] and optimizer.forward_passes == 12 and optimizer.sequences_evaluated == 48


@pytest.mark.parametrize("batch", [toys.batch(), None], ids=["scalar", "closure"])
def test_scalar_losses_and_closures_are_evaluated_sequentially(batch):
    model = toys.classifier()
    optimizer = ZerothOrder(model, "lozo", lr=1e-3)
    loss = toys.loss_function(model)
    if batch is None:
        optimizer.step(lambda: loss(toys.batch()))
    else:
        optimizer.step(lambda b: loss(b).mean(), batch)
    assert optimizer.evaluator.batched is False


def test_dense_matrices_are_evaluated_sequentially_by_default():
    model = nn.Linear(80, 70)
    optimizer = ZerothOrder(model, "mezo", lr=1e-3)
    optimizer.step(lambda x: model(x).mean(dim=1), torch.ones(2, 80))
    assert optimizer.evaluator.batched is False
    with pytest.raises(ValueError, match="forward_batching='batched' is not possible for weight, a weight of shape"):
        ZerothOrder(nn.Conv2d(80, 70, 1), "mezo", forward_batching="batched")
    with pytest.raises(ValueError, match="unknown forward_batching 'both'"):
        ZerothOrder(nn.Linear(80, 70), "mezo", forward_batching="both")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.LSTM(6, 5, batch_first=True), "in 'lstm', which has no batched form"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softmax(dim=0)), "its losses are"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Flatten(0, 1), nn.Unflatten(0, (4, 12))), "shape '.*' is invalid|unflatten"),
    ],
    ids=["no batched form", "rows that mix", "a fixed batch size"],
)
def test_what_cannot_be_stacked_falls_back_with_one_warning(build, reason):
    torch.manual_seed(0)
    models, x = [build(), build()], torch.randn(4, 12, 6)
    models[1].load_state_dict(models[0].state_dict())

    def loss_of(model: nn.Module):
        def loss(x: torch.Tensor) -> torch.Tensor:
            out = model(x)
            return (out[0] if isinstance(out, tuple) else out).square().sum(dim=(1, 2))

        return loss

    optimizers = [
        ZerothOrder(model, methods.lozo(eps=1e-2), lr=1e-3, forward_batching=p)
        for model, p in zip(models, ("auto", "sequential"), strict=True)
    ]
    with pytest.warns(UserWarning, match=reason) as caught:
        optimizers[0].step(loss_of(models[0]), x)
    assert len(caught) == 1
    optimizers[0].step(loss_of(models[0]), x)
    for _ in range(2):
        optimizers[1].step(loss_of(models[1]), x)
    assert torch.equal(optimizers[0].last_report.coefficients, optimizers[1].last_report.coefficients)


def test_the_decision_is_part_of_the_state():
    model = toys.classifier()
    optimizer = ZerothOrder(model, "lozo", lr=1e-3)
    assert optimizer.state_dict()["zotune"]["batched"] is None
    optimizer.step(toys.loss_function(model), toys.batch())
    state = optimizer.state_dict()
    assert state["zotune"]["batched"] is True
    resumed = ZerothOrder(toys.classifier(), "lozo", lr=1e-3)
    resumed.load_state_dict(state)
    assert resumed.evaluator.batched is True
    asked = ZerothOrder(toys.classifier(), "lozo", lr=1e-3, forward_batching="sequential")
    asked.load_state_dict(state)
    assert asked.evaluator.batched is False


# -- batches and stacks -------------------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_its_type_and_what_is_no_tensor_of_rows():
    from transformers import BatchEncoding

    pair = collections.namedtuple("pair", "x y")
    index, x = torch.tensor([1, 1, 0]), torch.arange(4.0).view(2, 2)
    taken = take_rows({"x": x, "scale": torch.tensor(2.0), "flag": True, "texts": ["a", "b"]}, index, 2)
    assert torch.equal(taken["x"], x[index]) and taken["scale"] == 2 and taken["flag"] is True and taken["texts"] == ["b", "b", "a"]
    assert torch.equal(take_rows(pair(x, 3), index, 2).x, x[index]) and take_rows(pair(x, 3), index, 2).y == 3
    assert isinstance(take_rows((x, x), index, 2), tuple)
    encoding = BatchEncoding({"input_ids": x})
    assert type(take_rows(encoding, index, 2)) is BatchEncoding and take_rows(encoding, index, 2)["input_ids"].shape == (3, 2)
    assert encoding["input_ids"] is x
    assert batch_rows({"x": x, "y": (x, torch.tensor(1.0))}) == 2


@pytest.mark.parametrize("batch", ["text", {"x": torch.ones(2, 3), "y": torch.ones(1, 3)}])
def test_a_batch_without_a_common_first_size_is_not_stackable(batch):
    with pytest.raises(NotBatchableError):
        batch_rows(batch)


def test_rows_of_a_stack_are_direction_major():
    stack = shared_layout(ESTIMATORS["central"].points(2), 0.1, 3, 0, 0)
    assert stack.source.tolist() == [0, 1, 2] * 4 and stack.directions == (0, 1) and stack.scales == ((0.1, -0.1),) * 2
    mixed = shared_layout(ESTIMATORS["forward"].points(2), 0.1, 3, 0, 0)
    assert mixed.directions == (0, 0, 1) and mixed.scales == ((0.0,), (0.1,), (0.1,)) and mixed.total == 9
    assert shared_layout([Point(0, 0), Point(1, 0)], 0.1, 3, 0, 0).scales == ((0.0, 0.1),)
    groups = assigned_layout((1, -1), 0.1, Assignment((0, 1, 2, 3), (4, 4, 5, 5)), 0, 0)
    assert groups.directions == (4, 5) and groups.rows == 2 and groups.source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert torch.tensor([1, 2, -1, -2, 3, 4, -3, -4])[groups.losses].tolist() == [[1, 2, 3, 4], [-1, -2, -3, -4]]
    uneven = assigned_layout((1, -1), 0.1, Assignment((0, 1, 2, 3, 4), (0, 0, 0, 1, 1)), 0, 0)
    assert uneven.directions == (0, 0, 0, 1, 1) and uneven.rows == 1


def test_an_examples_directions_share_its_evaluation_at_theta():
    """Two examples, two directions each: rows θ, θ, then each pair moved; the pairs read their example's row at θ."""
    (owned,) = assign_directions([2], 2, 2)
    assert (owned.examples, owned.directions) == ((0, 0, 1, 1), (0, 1, 2, 3))
    stack = assigned_layout((0, 1), 0.1, owned, 0, 0)
    assert stack.source.tolist() == [0, 1, 0, 0, 1, 1] and stack.losses.tolist() == [[0, 0, 1, 1], [2, 3, 4, 5]]
    assert stack.scales == ((0.0,),) * 2 + ((0.1,),) * 4 and stack.directions[2:] == (0, 1, 2, 3)
    both = assigned_layout((1, -1), 0.1, owned, 0, 0)
    assert both.source.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and both.losses.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_parts_are_shared_out_over_micro_batches():
    shares = assign_directions([3, 2], 2, 1)
    assert [share.directions for share in shares] == [(0, 0, 0), (1, 1)]
    assert [share.examples for share in assign_directions([1, 2], 3, 2)] == [(0, 0), (0, 0, 1, 1)]
    assert [share.directions for share in assign_directions([1, 2], 3, 2)] == [(0, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("kind", Directions.KINDS)
@pytest.mark.parametrize("shape", [(1,), (5, 3), (GROUPED_NUMEL + 1,), (40_000,)])
def test_many_directions_are_the_directions_one_by_one(kind, shape):
    directions, key = Directions(kind), Key(3, 7, 0, "w")
    one_by_one = torch.stack([directions.draw(key._replace(direction=k), shape) for k in range(20)])
    for first, count in ((0, 1), (0, 20), (1, 2), (3, 9), (4, 4), (8, 8), (16, 3), (19, 1)):
        many = directions.draw_many(key._replace(direction=first), count, shape)
        assert torch.equal(many, one_by_one[first : first + count])
    assert len({tuple(row.flatten()[:1000].tolist()) for row in one_by_one}) == (
        20 if one_by_one[0].numel() > 14 else len(one_by_one.unique(dim=0))
    )


def test_groups_of_directions_cover_every_direction_once():
    groups = {group_of(k, 100) for k in range(64)}
    assert sorted(k for first, count in groups for k in range(first, first + count)) == list(range(64))
    assert all(count <= 3 * max(1, first) for first, count in groups)
    assert group_of(5, GROUPED_NUMEL + 1) == (5, 1)


def test_numbers_of_different_directions_are_independent():
    z = Directions("gaussian").draw_many(Key(0, 0, 0, "w"), 40, (500,))
    correlation = torch.corrcoef(z) - torch.eye(40)
    assert float(correlation.abs().max()) < 6 / 500**0.5


# -- matrices in full space ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("scales", [(1e-2, -1e-2), (0.0, 1e-2), (1e-2, 3e-2)])
def test_weights_formed_together_are_those_formed_alone(dtype, kind, scales):
    weight = torch.nn.Parameter(torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).to(dtype))
    coordinate = FullCoordinate("w", weight)
    directions = Directions(kind)
    coordinate.descend(directions, [1e-4], 1.0, 7, 3)  # so that there is a residual
    key = Key(7, 4, 0, "w")
    directions.draw(key, (1 << 18,))  # from now on a draw lies where the last one did
    formed = [[], []]
    for rows, strips in coordinate.strips_at_scales(directions, key, scales, 32):
        assert all(strip.shape == (rows.stop - rows.start, 90) for strip in strips)
        for kept, strip in zip(formed, strips, strict=True):
            kept.append(strip.clone())
    for scale, strips in zip(scales, formed, strict=True):
        alone = coordinate.at(directions, Offset(scale, 7, 4, 0) if scale else None)
        assert torch.equal(torch.cat(strips), alone)


#: Wide enough that a matrix is not thin.
WIDE = {
    "llama": {"hidden_size": 72, "intermediate_size": 80, "vocab_size": 70},
    "opt": {"hidden_size": 72, "ffn_dim": 80, "word_embed_proj_dim": 72, "vocab_size": 300},
    "gpt2": {"n_embd": 72, "vocab_size": 70},
}


@pytest.mark.parametrize("architecture", WIDE)
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_both_points_of_a_dense_step_in_one_forward(architecture, estimator):
    steps = []
    for forward_batching in ("sequential", "batched"):
        model = toys.transformer(architecture, **WIDE[architecture])
        optimizer = ZerothOrder(model, methods.mezo(estimator=estimator, eps=1e-2), lr=1e-3, forward_batching=forward_batching)
        assert optimizer.forward.dense is not None
        for _ in range(3):
            optimizer.step(toys.transformer_loss(model), toys.tokens(6, 9))
        assert optimizer.evaluator.batched is (forward_batching == "batched")
        steps.append((optimizer.last_report.coefficients, optimizer.last_report.loss))
    (c, loss), (c2, loss2) = steps
    assert c2 == pytest.approx(c, rel=2e-2) and loss2 == pytest.approx(loss, rel=1e-5)


def test_several_dense_directions_are_not_evaluated_together():
    with pytest.raises(ValueError, match="use one direction per step"):
        ZerothOrder(toys.transformer("llama", **WIDE["llama"]), methods.mezo(num_directions=2), lr=1e-3, forward_batching="batched")
