"""`zotune eval --vote`: answers by the majority of the best points of a run of random search."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import toys
from command_cases import Result, run_command
from zotune import ZerothOrder, methods, objectives, tasks
from zotune.optim.journal import Journal
from zotune.optim.points import best_points
from zotune.tasks.metrics import majority

Command = Callable[..., Result]
TRAIN = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--num_eval", "24", "--max_steps", "1"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run_command(capsys, *words)


def test_the_majority_counts_votes_and_breaks_ties_by_rank() -> None:
    votes = [["a", "a", None, 0, None], ["b", "b", "x", 1, None], ["b", "c", None, 1, None], ["a", "c", None, 2, None]]
    assert majority(votes).tolist() == [0, 2, 1, 1, 0]


def test_the_best_points_are_those_with_the_lowest_losses(tmp_path: Path) -> None:
    """Around the weights before the last step; the first of them is where a run at η = 1 ends."""
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.randopt(num_directions=5, eps="auto"), journal=tmp_path / "j")
    for step in range(2):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    again, points = best_points(base := toys.classifier(), Journal.open(tmp_path / "j"), 5)
    assert again.steps == 1
    losses = [float(again.forward.evaluate(lambda: toys.loss_function(base)(toys.batch(seed=1)), point).mean()) for point in points]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(float(toys.loss_function(model)(toys.batch(seed=1)).detach().mean()), abs=1e-5)
    with pytest.raises(ValueError, match="has 5 points with a loss: give a number from 1 to that, not 6"):
        best_points(toys.classifier(), Journal.open(tmp_path / "j"), 6)


def test_a_vote_is_the_majority_of_its_points(workplace: Path, command: Command) -> None:
    run = command(*TRAIN, "--method", "randopt", "--num_directions", "5", "--eps", "3e-2", "--eval_strategy", "no", "--output_dir", "out")
    assert run.code == 0, run.err
    metrics = {
        count: json.loads(command("eval", "--model_name_or_path", "out", "--vote", count, "--output_file", "-").out)["metrics"]
        for count in ("1", "3")
    }
    assert metrics["1"]["accuracy"] == json.loads(Path("out/summary.json").read_text())["after"]["accuracy"]
    base = LlamaForCausalLM.from_pretrained("my-model", dtype=torch.float32)
    optimizer, points = best_points(base, Journal.open("out/journal.zo"), 3)
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    data = tasks.prepare(tokenizer, base.config, task="sst2", data_dir="data", num_eval=24, seed=42, parts=("eval",))
    batch = data.collate_eval(list(data.eval))
    votes = [optimizer.forward.evaluate(lambda: objectives.choice_scores(base, batch).argmax(dim=1), point).tolist() for point in points]
    chosen = torch.tensor([Counter(each).most_common(1)[0][0] for each in zip(*votes, strict=True)])
    assert metrics["3"]["accuracy"] == pytest.approx(float((chosen == batch["answer"]).float().mean()))
    assert len({tuple(each) for each in votes}) > 1
    for words, message in (
        (["my-model", "--task", "sst2", "--data_dir", "data", "--vote", "3"], "give its folder, with the journal"),
        (["out", "--vote", "6"], "give a number from 1 to that, not 6"),
    ):
        refused = command("eval", "--model_name_or_path", *words)
        assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1
