"""The command line: what it prints, what it refuses, what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import zotune
from command_cases import Result, run_command, save_encoder, weights_digest
from zotune import bundled
from zotune.training.run_folder import resume_command

Command = Callable[..., Result]
BASICS = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "6", "--learning_rate", "1e-3"]


@pytest.fixture
def encoder(workplace: Path) -> Path:
    save_encoder(workplace / "encoder")
    return workplace / "encoder"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run_command(capsys, *words)


# -- the top level ----------------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from zotune.cli.main import main; codes = [main(['--help']), main(['--version']), main([])]; "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'datasets'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else any(codes))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert zotune.__version__ in done.stdout
    for name in ("train", "eval", "replay", "methods", "tasks", "quickstart", "bench"):
        assert f"\n  {name} " in done.stdout


def test_python_m_zotune_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "zotune", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "zotune: unknown command 'trian': did you mean `zotune train`?\n"


def test_train_help_begins_with_a_dozen_options(command: Command) -> None:
    shown = command("train", "--help")
    assert shown.code == 0
    first = shown.out.split("first of all:\n")[1].split("\n\n")[0]
    flags = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert flags[:6] == ["--model_name_or_path", "--task", "--data_dir", "--output_dir", "--method", "--learning_rate"]
    assert len(flags) == 12
    assert "`zotune methods` lists" in " ".join(first.split())
    assert "--dataloader_num_workers" not in shown.out
    everything = command("train", "--help-all").out
    assert "--dataloader_num_workers" in everything
    assert everything.startswith(shown.out.split("\n\n`zotune train --help-all`")[0])


def test_methods_and_tasks_list_their_registries(command: Command) -> None:
    shown = command("methods").out
    for name in zotune.methods.names():
        assert f"\n {name} " in shown
    assert f"\n {zotune.methods.default().name} *" in shown
    assert "N ← β N + (1 − β) c U" in command("methods", "lozo-m").out
    shown = command("tasks").out
    for name in zotune.tasks.names():
        assert f"\n {name} " in shown
    assert "'{sentence} It was'" in command("tasks", "sst2").out


# -- what is refused: one sentence, exit code 2, nothing written ----------------------------------------------------


BAD_REQUESTS = {
    "unknown method": (["--method", "lozzo"], "unknown method 'lozzo'; did you mean 'lozo'?"),
    "unknown task": (["--task", "sst22"], "unknown task 'sst22'; did you mean 'sst2'"),
    "unknown option": (["--learning_rat", "1"], "unknown option '--learning_rat'; did you mean '--learning_rate'"),
    "abbreviated option": (["--learn", "1"], "unknown option '--learn'"),
    "option the method does not take": (["--method", "mezo", "--rank", "2"], "method 'mezo' has no option 'rank'"),
    "unknown choice": (["--scheme", "lra"], "--scheme: unknown value 'lra'; did you mean 'lora'"),
    "unknown schedule": (["--lr_scheduler_type", "liner"], "liner"),
    "wrong type": (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
    "impossible value": (["--eps", "-1"], "eps must be positive"),
    "option of a backward pass": (["--max_grad_norm", "1"], "no gradient is computed"),
    "stray word": (["sst2"], "'sst2' does not belong to an option"),
    "missing model folder": (["--model_name_or_path", "./nowhere"], "there is no model folder './nowhere'"),
    "missing hub model": (["--model_name_or_path", "nobody/nothing"], "the Hugging Face hub gave none of that name"),
    "missing data folder": (["--data_dir", "nowhere"], "--data_dir: there is no folder 'nowhere'"),
    "missing file": (["--train_file", "nowhere.jsonl"], "--train_file: there is no file 'nowhere.jsonl'"),
    "empty data set": (["--train_file", "empty.jsonl"], "empty.jsonl holds no rows"),
    "unparsable line": (["--train_file", "broken.jsonl"], "broken.jsonl, line 3 is not valid JSON"),
    "missing column": (["--train_file", "other-column.jsonl"], "has no column 'sentence'"),
    "label outside the options": (["--train_file", "odd-label.jsonl"], "odd-label.jsonl, line 2: column 'label' holds 7"),
    "prompt longer than the context": (["--train_file", "long.jsonl"], "more than the model's context of 32"),
    "unknown template": (["--template", "mezzo"], "no template 'mezzo'; did you mean 'mezo'"),
    "missing YAML file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "output folder is a file": (["--output_dir", "empty.jsonl"], "empty.jsonl is a file"),
    "nothing to resume": (["--resume_from_checkpoint"], "there is no zotune_run.json in out"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_wrong_request_is_one_sentence_and_writes_nothing(case: str, command: Command, workplace: Path) -> None:
    extra, expected = BAD_REQUESTS[case]
    before = sorted(workplace.rglob("*"))
    result = command("train", *BASICS, "--output_dir", "out", *extra)
    assert result.code == 2
    assert expected in result.err
    assert result.err.startswith("zotune: ") and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--task", "sst2", "--output_dir", "out"], "zotune train needs --model_name_or_path"),
        (["train", "--model_name_or_path", "my-model", "--task", "sst2"], "zotune train needs --output_dir"),
        (["train", "--model_name_or_path", "my-model", "--output_dir", "out"], "nothing to train on: pass --task"),
        (["eval", "--model_name_or_path", "my-model"], "nothing to evaluate on: pass --task"),
        (["eval", "--model_name_or_path", "my-model", "--tusk", "sst2"], "did you mean '--task'"),
        (["replay", "my-model"], "zotune replay takes the base model and the journal"),
        (["replay", "my-model", "none.zo", "--output_dir", "out"], "no journal at none.zo"),
        (["replay", "my-model", "my.jsonl", "--output_dir", "out"], "my.jsonl is not a zotune journal"),
        (["replay", "--verify", "my.jsonl"], "my.jsonl is not a zotune journal"),
        (["methods", "lozzo"], "did you mean 'lozo'"),
        (["tasks", "sst22"], "did you mean 'sst2'"),
        (["methods", "--al"], "unknown option '--al'"),
        (["quickstart", "--output_dir", "data"], "data holds something that is not an earlier quickstart"),
        (["quickstart", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_every_command_refuses_in_one_sentence(words: list[str], expected: str, command: Command, workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    result = command(*words)
    assert result.code == 2
    assert expected in result.err and result.err.count("\n") == 1
    assert sorted(workplace.rglob("*")) == before


def test_a_tokenizer_without_pad_and_end_token_is_an_error(command: Command, workplace: Path) -> None:
    path = workplace / "my-model/tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("pad_token", "eos_token"):
        config.pop(name)
    path.write_text(json.dumps(config))
    result = command("train", *BASICS, "--output_dir", "out")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "neither a padding token nor an end-of-text token" in result.err
    assert not Path("out").exists()


def test_a_non_finite_loss_ends_the_run_with_code_1(command: Command, workplace: Path) -> None:
    weights = load_file("my-model/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "my-model/model.safetensors", metadata={"format": "pt"})
    result = command("train", *BASICS, "--output_dir", "out", "--max_nonfinite_steps", "2")
    assert result.code == 1
    assert "finite" in result.err and result.err.count("\n") == 1
    assert not Path("out/model.safetensors").exists()


def test_traceback_is_shown_when_asked_for(command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in command("train", *BASICS, "--method", "x", "--output_dir", "out", "--traceback").err
    monkeypatch.setenv("ZOTUNE_TRACEBACK", "1")
    assert "Traceback" in command("methods", "x").err


# -- YAML -----------------------------------------------------------------------------------------------------------


def test_flags_override_the_yaml_file(command: Command, workplace: Path) -> None:
    Path("run.yaml").write_text(
        "model_name_or_path: my-model\ntask: sst2\ndata_dir: data\nmethod: mezo\nlearning_rate: 1e-4\nmax_steps: 50\n"
        "options: [' bad', ' good']\ntruncate: true\noutput_dir: out\n"
    )
    assert command("train", "--config", "run.yaml", "--max_steps", "2", "--learning-rate=2e-4").code == 0
    run = json.loads(Path("out/zotune_run.json").read_text())
    assert run["training_arguments"]["max_steps"] == 2
    assert run["training_arguments"]["learning_rate"] == 2e-4
    assert run["training_arguments"]["method"] == "mezo"
    assert run["data_arguments"]["options"] == [" bad", " good"]
    assert run["data_arguments"]["truncate"] is True


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lerning_rate: 1e-3", "bad.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("max_steps: many", "bad.yaml: --max_steps: invalid int value: 'many'"),
        ("max_steps: true", "bad.yaml: --max_steps: invalid int value: 'true'"),
        ("output_dir: [a, b]", "bad.yaml: output_dir takes one value, not a list"),
        ("scheme: partial", "bad.yaml: --scheme: unknown value 'partial'"),
        ("task: {a: 1", "bad.yaml, line"),
        ("- task", "bad.yaml: expected `option: value` lines, found a list"),
    ],
)
def test_a_wrong_yaml_file_is_named(line: str, expected: str, command: Command, workplace: Path) -> None:
    Path("bad.yaml").write_text(line + "\n")
    result = command("train", *BASICS, "--output_dir", "out", "--config", "bad.yaml")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert expected in result.err
    assert not Path("out").exists()


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lozo-m", "mezo-adam"])
def test_a_run_leaves_model_summary_curve_and_replayable_journal(method: str, command: Command, workplace: Path) -> None:
    result = command("train", *BASICS, "--method", method, "--output_dir", "out", "--logging_steps", "2")
    assert result.code == 0, result.err
    assert result.err == ""
    summary = json.loads(Path("out/summary.json").read_text())
    measured = summary["forward_passes"] - 12  # eps, and the learning rate before steps 0, 1, 2 and 4
    assert (summary["method"], summary["steps"]) == (method, 6) and measured > 3 * 4 and summary["eps"] > 0
    assert 0 <= summary["before"]["accuracy"] <= 1 and 0 <= summary["after"]["accuracy"] <= 1
    assert summary["memory"]["training"] >= summary["memory"]["loaded"] > 0
    assert f"{100 * summary['after']['accuracy']:.1f} %" in result.out
    assert Path("out/curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").glob(".*"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained("out")
    AutoTokenizer.from_pretrained("out")
    assert weights_digest("out") != weights_digest("my-model")

    assert command("replay", "my-model", "out", "--output_dir", "again").code == 0
    assert weights_digest("again") == weights_digest("out")
    assert command("replay", "my-model", "out/journal.zo", "--step", "0", "--output_dir", "base").code == 0
    assert weights_digest("base") == weights_digest("my-model")
    assert "6 steps intact" in command("replay", "--verify", "out").out
    refused = command("replay", "out", "out", "--output_dir", "third")
    assert refused.code == 2 and "not the one the journal starts from" in refused.err and not Path("third").exists()

    evaluated = command("eval", "--model_name_or_path", "out", "--output_file", "-")  # the data are the run's
    assert json.loads(evaluated.out)["metrics"]["accuracy"] == summary["after"]["accuracy"]


def test_a_folder_that_holds_a_run_is_left_alone_unless_told(command: Command, workplace: Path) -> None:
    assert command("train", *BASICS, "--output_dir", "out").code == 0
    Path("out/notes.txt").write_text("mine")
    first = weights_digest("out")
    result = command("train", *BASICS, "--output_dir", "out", "--seed", "1")
    assert result.code == 2
    assert "already holds a run" in result.err and "--resume_from_checkpoint" in result.err and result.err.count("\n") == 1
    assert weights_digest("out") == first
    assert command("train", *BASICS, "--output_dir", "out", "--seed", "1", "--overwrite_output_dir").code == 0
    assert weights_digest("out") != first
    assert Path("out/notes.txt").read_text() == "mine"


def test_resuming_from_the_command_line_equals_a_straight_run(command: Command, workplace: Path) -> None:
    words = [*BASICS, "--method", "lozo-m", "--interval", "2", "--save_steps", "4", "--lr_scheduler_type", "linear"]
    assert command("train", *words, "--output_dir", "straight").code == 0
    assert command("train", *words, "--output_dir", "cut").code == 0
    for path in [*Path("cut/checkpoint-6").iterdir(), *(Path("cut") / name for name in ("model.safetensors", "summary.json"))]:
        path.unlink()
    Path("cut/checkpoint-6").rmdir()
    resumed = command("train", *words, "--output_dir", "cut", "--resume_from_checkpoint", "true")
    assert resumed.code == 0, resumed.err
    assert weights_digest("cut") == weights_digest("straight")
    assert Path("cut/journal.zo").read_bytes() == Path("straight/journal.zo").read_bytes()
    straight, cut = (json.loads(Path(f"{name}/summary.json").read_text()) for name in ("straight", "cut"))
    for fact in ("before", "after", "loss", "steps", "forward_passes"):
        assert cut[fact] == straight[fact]


def test_lora_run_and_replay(command: Command, workplace: Path) -> None:
    pytest.importorskip("peft")
    words = ["--scheme", "lora", "--lora_r", "2", "--save_strategy", "no"]
    assert command("train", *BASICS, *words, "--output_dir", "out").code == 0
    assert command("replay", "my-model", "out", "--output_dir", "again").code == 0
    adapter = "adapter_model.safetensors"
    assert weights_digest("again", adapter) == weights_digest("out", adapter)
    assert weights_digest("out", adapter) != weights_digest("out/initial_adapter", adapter)
    summary = json.loads(Path("out/summary.json").read_text())
    evaluated = command("eval", "--model_name_or_path", "again", "--task", "sst2", "--data_dir", "data", "--output_file", "result.json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(Path("result.json").read_text())["metrics"]["accuracy"] == summary["after"]["accuracy"]


def test_encoder_run_and_replay(command: Command, workplace: Path, encoder: Path) -> None:
    words = ["--model_name_or_path", str(encoder), "--task", "sst2", "--data_dir", "data", "--max_steps", "4", "--save_steps", "2"]
    assert command("train", *words, "--method", "mezo", "--learning_rate", "1e-3", "--output_dir", "out").code == 0
    assert command("replay", str(encoder), "out", "--output_dir", "again").code == 0
    assert weights_digest("again") == weights_digest("out")
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}
    assert command("eval", "--model_name_or_path", "out").code == 0
    untrained = command("eval", "--model_name_or_path", str(encoder), "--task", "sst2", "--data_dir", "data")
    assert untrained.code == 2 and "no classification head yet" in untrained.err


def test_own_text_is_evaluated_by_loss(command: Command, workplace: Path) -> None:
    words = ["--model_name_or_path", "my-model", "--train_file", "my.jsonl", "--max_steps", "4", "--learning_rate", "1e-3"]
    assert command("train", *words, "--output_dir", "without").code == 0
    summary = json.loads(Path("without/summary.json").read_text())
    assert (summary["metric"], summary["before"], summary["after"]) == ("loss", None, None)
    assert command("train", *words, "--eval_file", "my.jsonl", "--output_dir", "with").code == 0
    summary = json.loads(Path("with/summary.json").read_text())
    assert summary["before"]["loss"] > 0 and summary["after"]["loss"] != summary["before"]["loss"]


#: `zotune` with these words in the folder cut-NAME of each signal, forked from a process that has imported it; each sends itself that
#: signal in its 7th step, whatever the machine's load. Their exit codes are printed, their errors are in NAME.err.
SIGNALLED = """
import os, signal, sys
import zotune.cli.train
from zotune.cli.main import main
from zotune import ZOTrainer
genuine, steps = ZOTrainer.training_step, 0
def step(*args, **kwargs):
    global steps
    steps += 1
    if steps == 7:
        os.kill(os.getpid(), number)
    return genuine(*args, **kwargs)
ZOTrainer.training_step = step
for number in (signal.SIGINT, signal.SIGTERM):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(number.name + ".err", os.O_WRONLY | os.O_CREAT), 2)
        sys.exit(main([*sys.argv[1:], "--output_dir", "cut-" + number.name]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


@pytest.mark.slow
def test_after_ctrl_c_or_sigterm_the_named_command_continues(command: Command, workplace: Path) -> None:
    words = [*BASICS, "--max_steps", "12", "--save_steps", "100", "--eval_strategy", "no"]
    assert command("train", *words, "--output_dir", "straight").code == 0
    launch = [sys.executable, "-c", SIGNALLED, "train", *words]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stderr.split() == ["130", "130"], done
    for number in (signal.SIGINT, signal.SIGTERM):
        folder, said = f"cut-{number.name}", Path(f"{number.name}.err").read_text()
        assert "Traceback" not in said
        assert resume_command([*words, "--output_dir", folder]) in said
        assert [path.name for path in Path(folder).glob("checkpoint-*")] == ["checkpoint-7"]  # the step was finished and saved
        assert command("verify", folder).code == 0
        assert not Path(folder, "model.safetensors").exists() and not Path(folder, "summary.json").exists()
        assert command("train", *words, "--output_dir", folder, "--resume_from_checkpoint", "true").code == 0
        assert weights_digest(folder) == weights_digest("straight")


def test_the_resume_command_drops_what_would_start_anew() -> None:
    words = ["--output_dir", "a b", "--overwrite_output_dir", "--resume_from_checkpoint", "x", "--task", "sst2"]
    assert resume_command(words) == "zotune train --output_dir 'a b' --task sst2 --resume_from_checkpoint true"


@pytest.mark.slow
def test_quickstart_compares_forward_only_with_backprop(command: Command, tmp_path: Path) -> None:
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick/quickstart.json").write_text("{}")  # an earlier one, which is replaced
    done = subprocess.run(
        [sys.executable, "-m", "zotune", "quickstart", "--steps", "1", "--adam_steps", "2", "--output_dir", str(tmp_path / "quick")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["what"]: row for row in json.loads((tmp_path / "quick/quickstart.json").read_text())["rows"]}
    zero_shot, forward_only, backprop = rows.values()
    assert [row["forward_passes"] for row in rows.values()] == [None, forward_only["forward_passes"], 2]
    assert forward_only["forward_passes"] > 2  # and those that the learning rate was measured with
    assert [row["backward_passes"] for row in rows.values()] == [None, 0, 2]
    adam = json.loads((tmp_path / "quick/adam/summary.json").read_text())
    assert adam["after"]["loss"] < adam["before"]["loss"] and adam["before"]["accuracy"] == zero_shot["accuracy"]
    assert backprop["extra_memory"] > 1.5 * forward_only["extra_memory"]  # gradients, two moments, stored activations
    assert forward_only["peak_memory"] >= zero_shot["peak_memory"]
    for name in rows:
        assert name in done.stdout
    assert (
        command("replay", str(bundled.path("tiny-lm")), str(tmp_path / "quick/forward-only"), "--output_dir", str(tmp_path / "r")).code == 0
    )
    assert weights_digest(tmp_path / "r") == weights_digest(tmp_path / "quick/forward-only")
