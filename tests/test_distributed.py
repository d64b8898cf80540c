"""Several processes: the same directions, a share of the evaluations each, the same update to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import distributed_runs
import distributed_training
import sharded_runs
import toys
import trainer_cases
import zotune
from zotune.distributed import Workers, sharing, traffic
from zotune.journal import Journal, digest
from zotune.replaying import replay

HERE = Path(__file__).parent


def torchrun(script: str, processes: int, out: Path, *words: str, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What every rank of `torchrun tests/SCRIPT OUT ...` has written."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    # torchrun's workers would find the addresses of those before the restart in the store that its agents share with them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*launch, str(HERE / script), str(out), *words], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(processes)]


# -- who evaluates what ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", sharing.MODES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("points", "columns"), [(1, 1), (2, 1), (2, 8), (8, 3), (9, 16), (2, 5)])
def test_every_pair_is_evaluated_once(mode: str, workers: int, points: int, columns: int) -> None:
    times = torch.zeros(points, columns, dtype=torch.int64)
    blocks = sharing.blocks(points, columns, workers, mode)
    for block in blocks:
        times[block.points.start : block.points.stop, block.columns.start : block.columns.stop] += 1
    assert len(blocks) == workers
    assert bool((times == 1).all())


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize(("points", "columns"), [(2, 8), (8, 4), (12, 1), (4, 24)])
def test_auto_keeps_everybody_busy(workers: int, points: int, columns: int) -> None:
    assert all(len(block) for block in sharing.blocks(points, columns, workers, "auto"))


def test_modes_cut_what_they_say() -> None:
    assert sharing.grid(8, 16, 4, "data") == (1, 4)
    assert sharing.grid(8, 16, 4, "directions") == (4, 1)
    assert sharing.grid(8, 16, 4, "both") == (2, 2)
    assert sharing.grid(8, 1, 4, "auto") == (4, 1), "a loss of one number a batch cannot be cut up"


def test_examples_of_one_direction_stay_together() -> None:
    edges = [0, 3, 6, 9, 12]
    for block in sharing.blocks(2, 12, 3, "data", edges):
        assert block.columns.start in edges and block.columns.stop in edges


@pytest.mark.parametrize("columns", [range(10), range(2, 3), range(3, 9), range(4, 4), range(5, 7)])
def test_pieces_cover_a_range_of_parts(columns: range) -> None:
    widths = [3, 0, 2, 5]
    starts = [0, 3, 3, 5]
    found = [starts[part] + place for part, start, stop in sharing.pieces(widths, columns) for place in range(start, stop)]
    assert found == list(columns)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown share 'dada'"):
        Workers(share="dada")
    with pytest.raises(ValueError, match="needs workers with the same batch"):
        Workers(share="directions", batches="own")
    with pytest.raises(ValueError, match="unknown share"):
        zotune.ZOConfig(output_dir="x", share="dada")


# -- several processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    which = "all" if request.param == 2 else "some"
    return torchrun("distributed_runs.py", request.param, tmp_path_factory.mktemp("runs"), which)


def runs(rank: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in rank.items() if name not in ("mistakes", "traffic")}


@pytest.mark.slow
def test_every_rank_is_in_the_same_state_after_every_step(ranks: list[dict[str, Any]]) -> None:
    for name, found in runs(ranks[0]).items():
        assert len(found["digests"]) == distributed_runs.STEPS
        assert all(rank[name] == found for rank in ranks), name


@pytest.mark.slow
def test_several_processes_do_what_one_does(ranks: list[dict[str, Any]]) -> None:
    """At the same global batch: evaluations of fewer rows differ in their last bits only."""
    for name, found in runs(ranks[0]).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of toys on which batched evaluation is given up
            alone = distributed_runs.run(name)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
        for several, one in zip(found["coefficients"], alone["coefficients"], strict=True):
            assert several == pytest.approx(one, rel=2e-3, abs=2e-3), name
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-4), name
        assert found["eps"] == alone["eps"], name
        assert [passes for passes, _ in found["counts"]] == [passes for passes, _ in alone["counts"]], name


@pytest.mark.slow
def test_losses_are_all_that_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["traffic"]["lozo"] == traffic.sent(2, distributed_runs.ROWS, len(ranks))
        assert rank["traffic"]["lozo-e"] == traffic.sent(2, 2 * distributed_runs.ROWS, len(ranks)), "θ and θ + εZ, two Z an example"


@pytest.mark.slow
def test_a_mistake_names_what_and_who(ranks: list[dict[str, Any]]) -> None:
    last = len(ranks) - 1
    for rank in ranks:
        told = rank["mistakes"]
        assert told["none"] == told["batches of their own"] == "nothing"
        for name in ("seed", "method", "lr", "weights", "batch"):
            assert told[name].startswith("WorkersDisagreeError: "), told[name]
            if len(ranks) > 2:  # of two, nobody can say who is right
                assert f"rank {last} " in told[name] or f"ranks {last} " in told[name], told[name]
            assert name in told[name]
        assert "before step 2" in told["weights"], "the next comparison finds it"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return {"choices": distributed_training.choices(folder, 1), "labels": distributed_training.labels(folder, 1), "folder": folder}


@pytest.mark.slow
def test_training_in_two_processes(tmp_path: Path, one_process: dict[str, Any]) -> None:
    """ZOTrainer under torchrun: ranks equal at every step and one process equal; one journal, which replays; predictions in order."""
    ranks = torchrun("distributed_training.py", 2, tmp_path)
    assert ranks[0] == ranks[1]
    found = ranks[0]["choices"]
    alone = one_process["choices"]
    assert found["losses"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in alone["losses"]]
    assert found["predictions"] == [pytest.approx(row, abs=1e-4) for row in alone["predictions"]]
    assert (found["accuracy"], found["epoch"]) == (alone["accuracy"], alone["epoch"])
    assert found["wrapped"] == "LlamaForCausalLM", "no DistributedDataParallel"
    optimizer = replay(trainer_cases.tiny_llama(), tmp_path / "choices" / "journal.zo")
    optimizer.detach()
    assert digest(optimizer.model) == found["weights"]
    own = one_process["labels"]
    assert ranks[0]["labels"]["losses"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in own["losses"]]
    assert ranks[0]["labels"]["weights"] == pytest.approx(own["weights"], abs=1e-4)
    assert "already holds a run" in ranks[0]["again"]


@pytest.mark.slow
def test_a_rank_that_dies_comes_back(tmp_path: Path, one_process: dict[str, Any]) -> None:
    """Killed at step 3 of 6, restarted by torchrun from the checkpoint of step 2: as if nothing had been; and so with other processes."""
    ranks = torchrun("distributed_training.py", 2, tmp_path, "dies", options=("--max-restarts=1",))
    assert ranks[0] == ranks[1]
    found = ranks[0]["choices"]
    whole = one_process["choices"]
    assert len(found["digests"]) == 4, "steps 2 to 5"
    assert found["losses"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in whole["losses"]]
    journal, other = (Journal.open(path / "choices" / "journal.zo") for path in (tmp_path, one_process["folder"]))
    for ours, theirs in zip(journal.records(), other.records(), strict=True):
        if not isinstance(ours, dict):
            assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-3, abs=1e-3)
    # One process goes on where two were, with their batches.
    for path in (tmp_path / "choices").glob("checkpoint-*"):
        if path.name != "checkpoint-4":
            path.rename(path.with_name(f"away-{path.name}"))
    resumed = distributed_training.choices(tmp_path, 2, resume=True)
    assert resumed["epoch"] == found["epoch"]
    assert [list(entry) for entry in resumed["losses"]] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in found["losses"]]


# -- weights that are split among processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sharded_weights_move_as_whole_ones_do(tmp_path: Path) -> None:
    """FSDP2: each of two processes holds half the rows, draws the numbers of its own, and all have the model of one process."""
    ranks = torchrun("sharded_runs.py", 2, tmp_path)
    for method in sharded_runs.METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{method} {dtype}"
            found = ranks[0][name]
            assert found == ranks[1][name], name
            assert found["rows"]["0.0.weight"] == [10, 16], "half of 20 rows"
            # The journal is that of the whole model, and rebuilds it.
            optimizer = replay(sharded_runs.blocks(toys.classifier(dtype)), tmp_path / f"{name}.zo")
            optimizer.detach()
            replayed = torch.cat([p.detach().float().flatten() for p in optimizer.model.parameters()]).tolist()
            if method == "lozo":  # products of fewer rows round differently
                assert replayed == pytest.approx(found["weights"], abs=1e-5 if dtype == torch.float32 else 2e-2), name
            else:
                assert replayed == found["weights"], name
        alone = sharded_runs.run(method, sharded_runs.blocks(toys.classifier()))
        found = ranks[0][f"{method} {torch.float32}"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), method
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-4), method
        assert found["after"] == pytest.approx(alone["after"], rel=1e-5), "detached, it is FSDP2's model as it was"
    for method in ("mezo-adam", "lozo-e"):
        assert f"{method} cannot train shards" in ranks[0]["refused"][method]
