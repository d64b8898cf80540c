"""Several processes: the same directions, a share of the evaluations each, the same update to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import accelerate
import psutil
import pytest
import torch
from benchmarks import traffic

import command_cases
import distributed_runs
import distributed_training
import paths
import sharded_runs
import toys
import trainer_cases
import zotune
from zotune.optim.distributed import Workers, partition
from zotune.optim.journal import Journal
from zotune.optim.replay import replay
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.weights.digest import digest

HERE = paths.HELPERS


#: What is run in processes that fork, as `forked.py` takes it.
JOBS = [("distributed_runs.py", "2", "two", "all"), ("distributed_runs.py", "4", "four", "some"), ("sharded_runs.py", "2", "shards")]
JOBS += [("distributed_training.py", "2+1", "training", "dies")]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the folders that the processes of JOBS have written to: as torchrun's, without starting each anew."""
    folder = tmp_path_factory.mktemp("worlds")
    words: list[str] = []
    for script, processes, out, *more in JOBS:
        (folder / out).mkdir()
        words += [script, processes, str(folder / out), *more, "--"]
    command = [sys.executable, str(HERE / "forked.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-20000:]
    return folder


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


# -- who evaluates what ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", partition.MODES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("points", "columns"), [(1, 1), (2, 1), (2, 8), (8, 3), (9, 16), (2, 5)])
def test_every_pair_is_evaluated_once(mode: str, workers: int, points: int, columns: int) -> None:
    times = torch.zeros(points, columns, dtype=torch.int64)
    blocks = partition.blocks(points, columns, workers, mode)
    for block in blocks:
        times[block.points.start : block.points.stop, block.columns.start : block.columns.stop] += 1
    assert len(blocks) == workers
    assert bool((times == 1).all())


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize(("points", "columns"), [(2, 8), (8, 4), (12, 1), (4, 24)])
def test_auto_keeps_everybody_busy(workers: int, points: int, columns: int) -> None:
    assert all(len(block) for block in partition.blocks(points, columns, workers, "auto"))


def test_modes_cut_what_they_say() -> None:
    assert partition.grid(8, 16, 4, "data") == (1, 4)
    assert partition.grid(8, 16, 4, "directions") == (4, 1)
    assert partition.grid(8, 16, 4, "both") == (2, 2)
    assert partition.grid(8, 1, 4, "auto") == (4, 1), "a loss of one number a batch cannot be cut up"


def test_examples_of_one_direction_stay_together() -> None:
    edges = [0, 3, 6, 9, 12]
    for block in partition.blocks(2, 12, 3, "data", edges):
        assert block.columns.start in edges and block.columns.stop in edges


@pytest.mark.parametrize("columns", [range(10), range(2, 3), range(3, 9), range(4, 4), range(5, 7)])
def test_pieces_cover_a_range_of_parts(columns: range) -> None:
    widths = [3, 0, 2, 5]
    starts = [0, 3, 3, 5]
    found = [starts[part] + place for part, start, stop in partition.pieces(widths, columns) for place in range(start, stop)]
    assert found == list(columns)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown parallelism 'dada'"):
        Workers(parallelism="dada")
    with pytest.raises(ValueError, match="needs workers with the same batch"):
        Workers(parallelism="directions", batches="own")
    with pytest.raises(ValueError, match="unknown parallelism"):
        zotune.ZOConfig(output_dir="x", parallelism="dada")


# -- several processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, worlds: Path) -> list[dict[str, Any]]:
    found = written(worlds / {2: "two", 4: "four"}[request.param])
    assert len(found) == request.param
    return found


def runs(rank: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in rank.items() if name not in ("mistakes", "traffic", "lost")}


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
        for name in ("seed", "method", "lr", "weights", "buffers", "batch", "later batch"):
            assert told[name].startswith("RankMismatchError: "), told[name]
            if len(ranks) > 2:  # of two, nobody can say who is right
                assert f"rank {last} " in told[name] or f"ranks {last} " in told[name], told[name]
            assert name.removeprefix("later ") in told[name]
        assert "at step 2" in told["later batch"], "the losses of the step bring it, not a comparison"
        assert "before step 2" in told["weights"], "the next comparison finds it"


@pytest.mark.slow
def test_a_rank_that_ends_is_one_sentence_to_the_others(worlds: Path) -> None:
    found = [rank["lost"] for rank in written(worlds / "four")]
    assert found[3] == "nothing"
    assert all(said.startswith("LostWorkerError: another process of this run has ended") for said in found[:3]), found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return {"choices": distributed_training.choices(folder, 1), "labels": distributed_training.labels(folder, 1), "folder": folder}


@pytest.fixture(scope="module")
def two_processes(worlds: Path) -> tuple[Path, list[dict[str, Any]]]:
    """ZOTrainer under torchrun's agent. A rank is killed at step 3 of 6; the agent restarts all, from the checkpoint of step 2."""
    return worlds / "training", written(worlds / "training")


@pytest.mark.slow
def test_training_in_two_processes(two_processes: tuple[Path, list[dict[str, Any]]], one_process: dict[str, Any]) -> None:
    """Ranks equal at every step and one process equal; one journal, which replays; predictions in order."""
    folder, ranks = two_processes
    assert all(ranks[0][name] == ranks[1][name] for name in ranks[0] if name != "command")
    found = ranks[0]["choices"]
    alone = one_process["choices"]
    assert found["losses"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in alone["losses"]]
    assert found["predictions"] == [pytest.approx(row, abs=1e-4) for row in alone["predictions"]]
    assert (found["accuracy"], found["epoch"]) == (alone["accuracy"], alone["epoch"])
    assert found["wrapped"] == "LlamaForCausalLM", "no DistributedDataParallel"
    optimizer = replay(trainer_cases.tiny_llama(), folder / "choices" / "journal.zo")
    optimizer.remove_hooks()
    assert digest(optimizer.model) == found["weights"]
    own = one_process["labels"]
    assert ranks[0]["labels"]["losses"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in own["losses"]]
    assert ranks[0]["labels"]["weights"] == pytest.approx(own["weights"], abs=1e-4)
    assert "already holds a run" in ranks[0]["again"]
    assert "takes 8 examples" in ranks[0]["other batch"] and "in 2 processes it would take 12" in ranks[0]["other batch"]


@pytest.mark.slow
def test_the_command_says_in_a_sentence_that_ranks_differ(two_processes: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, found in enumerate(two_processes[1]):
        wanted = (
            f"zotune (rank {rank}): rank 1 differs from the other workers in seed before step 0: start every worker with the same seed.\n"
        )
        assert found["command"] == [1, wanted]


@pytest.mark.slow
def test_two_processes_take_the_default_steps_of_one(two_processes: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """2 × 4 examples as 1 × 8, though the examples of a phase are observed 4 or 8 at a time."""
    found = two_processes[1][0]["default"]
    alone = distributed_training.default(tmp_path, 1)
    assert [len(coefficients) for coefficients in found] == [len(coefficients) for coefficients in alone]
    for several, one in zip(found, alone, strict=True):
        assert several == pytest.approx(one, rel=5e-3, abs=1e-3 * max(map(abs, one)))


@pytest.mark.slow
def test_a_rank_that_dies_comes_back(two_processes: tuple[Path, list[dict[str, Any]]], one_process: dict[str, Any], tmp_path: Path) -> None:
    """As if nothing had been; and so with other processes."""
    folder, ranks = two_processes
    found = ranks[0]["choices"]
    assert len(found["digests"]) == 4, "steps 2 to 5"
    journal, other = (Journal.open(path / "choices" / "journal.zo") for path in (folder, one_process["folder"]))
    for ours, theirs in zip(journal.records(), other.records(), strict=True):
        if not isinstance(ours, dict):
            assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-3, abs=1e-3)
    # One process goes on where two were, with their batches.
    shutil.copytree(folder / "choices", tmp_path / "choices", ignore=shutil.ignore_patterns("checkpoint-[!4]"))
    resumed = distributed_training.choices(tmp_path, 2, resume=True)
    assert resumed["epoch"] == found["epoch"]
    assert [list(entry) for entry in resumed["losses"]] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in found["losses"]]


STOPPED = """
import os, sys
from zotune.cli.main import main
from zotune import ZOTrainer
genuine = ZOTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 3 and os.environ["RANK"] == "0":
        open("ready", "w").close()
    return genuine(self, *args, **kwargs)
ZOTrainer.training_step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stopped_launch_saves_and_one_process_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch --cpu` of two processes, and SIGTERM: both finish the step and save, and say how to go on; one does."""
    monkeypatch.chdir(tmp_path)
    command_cases.save_model(tmp_path / "my-model")
    command_cases.save_data(tmp_path)
    (tmp_path / "stopped.py").write_text(STOPPED)
    words = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--learning_rate", "1e-3", "--use_cpu", "true"]
    words += [
        "--save_steps",
        "100000",
        "--eval_strategy",
        "no",
        "--max_steps",
        "100000",
        "--forward_batching",
        "batched",
        "--output_dir",
        "run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "stopped.py", "train", *words]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        limit = time.monotonic() + 200
        while not Path("ready").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        (agent,) = psutil.Process(process.pid).children()  # accelerate itself hands no signal on
        agent.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    assert run_folder.resume_command(words) in said, said[-4000:]
    (saved,) = Path("run").glob("checkpoint-*")
    done = int(saved.name.removeprefix("checkpoint-"))
    assert storage.problem(saved, "run/journal.zo") is None and len(Journal.open("run/journal.zo")) == done >= 3
    assert not Path("run/model.safetensors").exists()

    kept = Path("run/journal.zo").read_bytes()
    words[words.index("100000", words.index("--max_steps"))] = str(done + 2)
    result = command_cases.run_command(capsys, "train", *words, "--resume_from_checkpoint", "true")
    assert result.code == 0, result.err
    assert Path("run/journal.zo").read_bytes().startswith(kept) and len(Journal.open("run/journal.zo")) == done + 2


# -- weights on several devices --------------------------------------------------------------------------------------------------------


def test_a_model_accelerate_dispatched_trains_as_the_plain_one(tmp_path: Path) -> None:
    """What `device_map="auto"` makes of a model: hooks around its modules that move what goes in and out."""
    found = []
    for dispatched in (False, True):
        model = trainer_cases.tiny_llama()
        if dispatched:
            names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(len(model.model.layers))), "model.norm"]
            device_map: dict[str, Any] = dict.fromkeys([*names, "model.rotary_emb", "lm_head"], "cpu")
            model = accelerate.dispatch_model(model, device_map=device_map, main_device="cpu", force_hooks=True)
            assert all(hasattr(layer, "_hf_hook") for layer in model.model.layers) and model.hf_device_map == device_map
        folder = tmp_path / str(dispatched)
        run = trainer_cases.trainer(
            folder, model, train_dataset=trainer_cases.choice_rows(20), max_steps=3, method="lozo", forward_batching="batched"
        )
        run.train()
        found.append(({name: p.detach().clone() for name, p in model.named_parameters()}, (folder / "journal.zo").read_bytes()))
    assert found[0][1] == found[1][1]
    assert trainer_cases.same_weights(found[0][0], found[1][0])
    optimizer = replay(trainer_cases.tiny_llama(), tmp_path / "True" / "journal.zo")
    optimizer.remove_hooks()
    assert trainer_cases.same_weights(dict(optimizer.model.named_parameters()), found[1][0])


# -- weights that are split among processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sharded_weights_move_as_whole_ones_do(worlds: Path) -> None:
    """FSDP2: each of two processes holds half the rows, draws the numbers of its own, and all have the model of one process."""
    ranks = written(worlds / "shards")
    for method in sharded_runs.METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{method} {dtype}"
            found = ranks[0][name]
            assert found == ranks[1][name], name
            assert found["rows"]["0.0.weight"] == [10, 16], "half of 20 rows"
            # The journal is that of the whole model, and rebuilds it.
            optimizer = replay(sharded_runs.blocks(toys.classifier(dtype)), worlds / "shards" / f"{name}.zo")
            optimizer.remove_hooks()
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
