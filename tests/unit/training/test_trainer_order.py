"""Batches by length: less padding, nothing else; a resumed epoch is the one that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from trainer_cases import StopAt, choice_rows, journal_of, labelled_rows, losses, same_weights, tiny_llama, trainer, weights
from zotune.objectives.losses import choice_scores
from zotune.tasks import ChoicesCollator
from zotune.training.samplers import GroupedByLength, LongestFirst, eval_sampler, lengths_of

collate = ChoicesCollator(pad_token_id=0)


def uneven_rows(count: int = 40) -> list[dict[str, Any]]:
    """Prompts of 2 to 20 tokens, two options of one to three."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = int(torch.randint(2, 21, (), generator=generator))
        ids = torch.randint(0, 90, (length + 4,), generator=generator).tolist()
        rows.append({"prompt_ids": ids[:length], "option_ids": [ids[-3:], ids[-1:]], "answer": number % 2, "number": number})
    return rows


GROUPED: dict[str, Any] = {
    "train_dataset": uneven_rows(),
    "data_collator": collate,
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 4,
    "max_steps": 26,  # of 10 an epoch
    "logging_steps": 5,
    "learning_rate": 1e-3,
    "forward_batching": "batched",  # "auto" chooses by the clock, and two runs may choose otherwise
}


def orders(run: Any, epochs: int) -> list[list[int]]:
    loader, found = run.get_train_dataloader(), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found.append([index for batch in loader.batch_sampler for index in batch])
    return found


def test_grouping_pads_less_and_takes_each_example_once_an_epoch(tmp_path: Path) -> None:
    lengths = lengths_of(GROUPED["train_dataset"], "length")
    padded = {}
    for strategy in ("random", "group_by_length"):
        taken = orders(trainer(tmp_path / strategy, **{**GROUPED, "train_sampling_strategy": strategy}), 3)
        assert all(sorted(order) == list(range(40)) for order in taken) and taken[0] != taken[1] != taken[2]
        padded[strategy] = sum(4 * max(lengths[i] for i in order[at : at + 4]) for order in taken for at in range(0, 40, 4))
    assert 3 * sum(lengths) <= padded["group_by_length"] < 0.95 * padded["random"]


def test_the_order_follows_from_seed_and_epoch_alone(tmp_path: Path) -> None:
    first = orders(trainer(tmp_path / "one", **GROUPED), 2)
    state = torch.get_rng_state()
    torch.rand(1)
    assert orders(trainer(tmp_path / "two", **GROUPED), 2) == first
    torch.set_rng_state(state)
    assert orders(trainer(tmp_path / "three", **{**GROUPED, "data_seed": 9}), 2) != first
    sampler = GroupedByLength([1, 2, 3] * 9, 3, seed=1)
    list(sampler)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop", [9, 17])
def test_a_resumed_run_is_the_straight_run(stop: int, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", **GROUPED)
    straight.train()
    saving = {**GROUPED, "save_strategy": "steps", "save_steps": 7}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "resumed", callbacks=[StopAt(stop)], **saving).train()
    resumed = trainer(tmp_path / "resumed", tiny_llama(seed=99), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(weights(straight.model), weights(resumed.model)) and losses(straight) == losses(resumed)
    records = [list(journal_of(tmp_path / name).records()) for name in ("straight", "resumed")]
    assert records[0] == records[1] and len(records[0]) == 26


def test_lengths_are_those_of_the_longest_row_or_of_the_column() -> None:
    assert lengths_of([{"prompt_ids": [1, 2], "option_ids": [[1], [1, 2, 3]]}], "length") == [5]
    assert lengths_of([{"prompt_ids": [1, 2], "completion_ids": [3]}, {"input_ids": [1], "label": 0}], "length") == [3, 1]
    assert lengths_of([{"text": "a", "length": 7}], "length") == [7]
    assert lengths_of(datasets.Dataset.from_dict({"size": [4, 2], "input_ids": [[1], [2]]}), "size") == [4, 2]
    assert lengths_of(datasets.Dataset.from_dict({"input_ids": [[1], [2, 3]]}), "size") == [1, 2]
    assert lengths_of([{"text": "a"}], "length") is None and lengths_of([torch.ones(2)], "length") is None


def test_grouping_without_lengths_says_what_is_missing(tmp_path: Path) -> None:
    run = trainer(tmp_path, **{**GROUPED, "train_dataset": [{"text": "a"}] * 8})
    with pytest.raises(ValueError, match=r"'group_by_length' needs to know how long .* column 'length', prompt_ids or input_ids"):
        run.train()


# -- evaluation ---------------------------------------------------------------------------------------------------------------------------


class Noting:
    """A collator that counts what a batch costs."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        self.numbers += [row["number"] for row in rows]
        self.tokens += batch["input_ids"].numel()
        return batch


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_evaluation_runs_longest_first_and_answers_in_data_order(strategy: str, tmp_path: Path) -> None:
    rows, seen, noting = uneven_rows(), [], Noting()

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"mean": float(found.losses.mean())}

    options = {"per_device_eval_batch_size": 6, "include_for_metrics": ["inputs", "loss"], "train_sampling_strategy": strategy}
    run = trainer(tmp_path, compute_metrics=metrics, eval_data_collator=noting, **options)
    predicted = run.predict(rows)
    assert noting.numbers != list(range(40)) and sorted(noting.numbers) == list(range(40))
    assert noting.tokens < 0.8 * sum(collate(rows[at : at + 6])["input_ids"].numel() for at in range(0, 40, 6))
    with torch.no_grad():
        alone = torch.cat([choice_scores(run.model.eval(), collate([row])).log_softmax(dim=1) for row in rows])
    for scores, answers in ((predicted.predictions, predicted.label_ids), (seen[0].predictions, seen[0].label_ids)):
        np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-4)
        assert answers.tolist() == [row["answer"] for row in rows]
    assert [ids[: len(row["prompt_ids"])].tolist() for ids, row in zip(seen[0].inputs, rows, strict=True)] == [
        r["prompt_ids"] for r in rows
    ]
    expected = torch.nn.functional.nll_loss(alone, torch.tensor([row["answer"] for row in rows])).item()
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-4)
    assert run.compute_metrics is metrics


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (labelled_rows(), {}),  # a batch's loss is a mean over its tokens, so who is in it matters
        (choice_rows(), {"dataloader_drop_last": True}),  # which would drop the shortest
        (choice_rows(), {"batch_eval_metrics": True, "compute_metrics": lambda found, compute_result: {}}),
        (datasets.Dataset.from_list(choice_rows()), {}),
        ([torch.ones(2)], {}),
    ],
)
def test_where_the_order_could_matter_evaluation_keeps_it(rows: Any, options: dict[str, Any], tmp_path: Path) -> None:
    sampler = eval_sampler(rows, trainer(tmp_path, **options).args)
    assert list(sampler) == list(range(len(rows)))


def test_results_of_any_nesting_go_back() -> None:
    order = LongestFirst([2, 9, 5])
    assert list(order) == [1, 2, 0] and len(order) == 3
    found = order.restored({"a": np.array([1, 2, 0]), "b": (np.array([[1.0], [2.0], [0.0]]), None, [np.array([1, 2])])})
    assert found["a"].tolist() == [0, 1, 2] and found["b"][0].tolist() == [[0.0], [1.0], [2.0]]
    assert found["b"][1] is None and found["b"][2][0].tolist() == [1, 2]


def test_batches_hold_every_class_by_default(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=uneven_rows(), data_collator=collate, per_device_train_batch_size=8)
    for order in orders(run, 2):
        answers = [uneven_rows()[index]["answer"] for index in order]
        assert all(sum(answers[at : at + 8]) == 4 for at in range(0, 40, 8))


@pytest.mark.parametrize(
    ("options", "directions"),
    [
        ({}, (3, "group", 2)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, (3, "group", 2)),
        ({"per_device_train_batch_size": 4}, (3, "example", 1)),  # fewer than four groups
        ({"directions_per": "example", "num_directions": 1}, (1, "example", 1)),
        ({"num_directions": 2}, (2, "group", 2)),
        ({"method_args": {"directions_per": "example"}}, (3, "example", 1)),
        ({"train_sampling_strategy": "random"}, (3, "example", 1)),
        ({"method": "lozo"}, (1, "batch", 1)),
    ],
)
def test_groups_of_different_classes_have_directions_by_default(tmp_path: Path, options: dict, directions: tuple) -> None:
    settings = {"method": "lozo-e", "per_device_train_batch_size": 8, **options}
    run = trainer(tmp_path, train_dataset=uneven_rows(), data_collator=collate, **settings)
    run.create_optimizer()
    method = run.zo_optimizer.method
    assert (method.num_directions, method.directions_per, method.group_size) == directions
