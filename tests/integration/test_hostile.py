"""Input from elsewhere: whatever bytes a file holds, the answer is what it says or one sentence, and none of its code runs."""

from __future__ import annotations

import copy
import datetime
import gzip
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import toys
from command_cases import Result, run_command, save_data, save_model
from trainer_cases import StopAt, choice_rows, same_weights, tiny_llama, trainer, weights
from zotune import ZerothOrder
from zotune.bench import grid
from zotune.io import safe_yaml
from zotune.optim.journal import Journal, verify
from zotune.optim.journal_records import MAGIC, MOST_GROUPS
from zotune.optim.replay import replay
from zotune.tasks import loader, sources
from zotune.tasks.chat import chat_of
from zotune.tasks.chat_template import ChatTemplate, scored_characters
from zotune.training import resume
from zotune.training.arguments import DataArguments, ModelArguments
from zotune.training.checkpoint import contents, storage
from zotune.training.config import ZOConfig
from zotune.training.loading import load_model, load_tokenizer, plan_model
from zotune.training.option_parser import OptionParser
from zotune.training.schemes import Scheme, load_adapter

fuzz = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EVIL_YAML = [
    "!!python/object/apply:os.system [touch PWNED]",
    "!!python/name:os.system",
    "!!timestamp x",
    "!!bool x",
    "2023-99-99",
    "!!int x",
]


class Evil:
    """What a pickle that is loaded without care does."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("PWNED",)


@pytest.fixture(autouse=True)
def no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("PWNED*"))


def sentence(error: BaseException) -> str:
    text = str(error)
    assert isinstance(error, ValueError) and text and "\n" not in text.strip() and len(text) < 2000
    return text


# -- the journal ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("real") / "j"
    model = toys.classifier()
    optimizer = ZerothOrder(model, toys.method("lozo-e", eps="auto"), lr="auto", journal=path)
    for step in range(4):
        optimizer.step(toys.loss_function(model), toys.batch(seed=step))
    return path.read_bytes()


def sealed(kind: int, payload: bytes) -> bytes:
    body = struct.pack("<BH", kind, len(payload)) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def with_header(header: bytes, records: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<I", len(header)) + header + struct.pack("<I", zlib.crc32(header)) + records


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
EVENTS = ["fold", "eps", "observed", "scales", "measured", "forward_batching", "general_path", "?"]
events = st.fixed_dictionaries(
    {"event": st.sampled_from(EVENTS)},
    optional={"value": json_values, "values": json_values, "batched": json_values, "names": json_values, "pieces": json_values},
)
pieces = st.builds(
    lambda dtype, shape, at, data: {"event": "observed", "pieces": [["0.weight", dtype, shape, at, data]]},
    st.sampled_from(["float32", "load", "nowhere"]),
    st.lists(st.integers(-2, 1 << 40), max_size=3),
    st.integers(-5, 5),
    st.text(max_size=8),
)


@fuzz
@given(data=st.binary(max_size=500))
def test_any_bytes_are_no_journal(data: bytes, tmp_path: Path) -> None:
    for content in (data, b"ZOJ1" + data, with_header(data), with_header(b"{}", data)):
        (tmp_path / "j").write_bytes(content)
        try:
            list(Journal.open(tmp_path / "j").records())
        except ValueError as error:
            assert str(tmp_path / "j") in sentence(error)
        assert isinstance(verify(tmp_path / "j").message, str)


@fuzz
@given(records=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.binary(max_size=60)), max_size=3), added=events | pieces | json_values)
def test_records_of_any_content_replay_or_are_named(records: list[tuple[int, bytes]], added: Any, real: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(real + sealed(2, json.dumps(added).encode()) + b"".join(sealed(*record) for record in records))
    try:
        replay(toys.classifier(), path)
    except ValueError as error:
        assert str(path) in sentence(error)


@fuzz
@given(key=st.sampled_from(["base", "groups", "method", "options", "seed", "device", "eps", "version"]), value=json_values)
def test_a_header_of_any_content_is_that_of_a_run_or_refused(key: str, value: Any, real: bytes, tmp_path: Path) -> None:
    length = struct.unpack_from("<I", real, 4)[0]
    header = {**json.loads(real[8 : 8 + length]), key: value}
    (tmp_path / "j").write_bytes(with_header(json.dumps(header).encode(), real[12 + length :]))
    try:
        replay(toys.classifier(), tmp_path / "j")
    except ValueError as error:
        sentence(error)


def test_a_small_journal_takes_little_memory(tmp_path: Path) -> None:
    """A step of 27 bytes has a rate for each group of the header: a header of a million groups would make gigabytes of it."""
    for count in (MOST_GROUPS, 1_000_000):
        header = json.dumps({"groups": [0] * count}, separators=(",", ":")).encode()
        steps = b"".join(sealed(1, struct.pack("<IfBH?df", step, 0.5, 1, 1, False, 1e-3, 0.25)) for step in range(500))
        (tmp_path / "j").write_bytes(with_header(header, steps))
        tracemalloc.start()
        if count == MOST_GROUPS:
            assert len(Journal.open(tmp_path / "j")) == 500
        else:
            with pytest.raises(ValueError, match="header does not parse"):
                Journal.open(tmp_path / "j")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30_000_000
    with pytest.raises(ValueError, match=f"at most {MOST_GROUPS} parameter groups"):
        Journal.create(tmp_path / "other", {"groups": [0] * (MOST_GROUPS + 1)})
    assert not (tmp_path / "other").exists()


def test_an_observation_of_a_terabyte_is_not_allocated(real: bytes, tmp_path: Path) -> None:
    event = {"event": "observed", "pieces": [["0.weight", "float32", [1 << 20, 1 << 20], 0, ""]]}
    (tmp_path / "j").write_bytes(real + sealed(2, json.dumps(event).encode()))
    with pytest.raises(ValueError, match=r"record \d+ is none of a run"):
        replay(toys.classifier(), tmp_path / "j")


# -- YAML -----------------------------------------------------------------------------------------------------------------------------


@fuzz
@given(text=st.text(max_size=60) | st.text(alphabet="a1:-[]{}&*!|>'\"#, \n\t?%@~<=._", max_size=60))
def test_any_text_is_yaml_or_a_sentence(text: str) -> None:
    try:
        safe_yaml.parse(text, "my.yaml")
    except ValueError as error:
        assert sentence(error).startswith("my.yaml")


def test_yaml_that_runs_code_recurses_or_explodes_is_refused() -> None:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    for text in (*EVIL_YAML, laughs, "a: &a [*a]", "a: &a {b: *a}", "[" * 5000, "{a: " * 5000, "a: " + "&a " * 3 + "x"):
        with pytest.raises(ValueError, match=r"^my\.yaml") as caught:
            safe_yaml.parse(text, "my.yaml")
        sentence(caught.value)
    assert safe_yaml.parse("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}", "my.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}


junk: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", "{x}", "{", "../../x", "/etc/passwd", [], ["a"], [[]], [None],
     {}, {"a": 1}, {1: 2}, {"a": {"b": []}}, datetime.date(2023, 1, 1), b"ab", "--seed", ["--seed"], "a\nb"]
)  # fmt: skip


def replaced(content: Any, places: list[int], values: list[Any]) -> Any:
    """The document with some of its values exchanged."""

    def below(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path] * bool(path) + [found for key, each in items for found in below(each, (*path, key))]

    content = copy.deepcopy(content)
    for place, value in zip(places, values, strict=False):
        paths = below(content)
        if not paths:
            break
        *path, last = paths[place % len(paths)]
        inner = content
        for key in path:
            inner = inner[key]
        inner[last] = copy.deepcopy(value)
    return content


TASKS = {name: yaml.safe_load((Path(loader.__file__).parent / f"{name}.yaml").read_text()) for name in ("sst2", "squad", "copa", "record")}
GRID = yaml.safe_load(
    "models: [a/b, {model: c, label: d, options: {dtype: float32}}]\ntasks: [sst2, rte]\n"
    "seeds: [0, 1]\nbudget: {steps: 10}\n"
    "methods: [lozo, {method: mezo, grid: {learning_rate: [1e-6, 1e-7]}, tasks: [sst2], budget: {sequences: 5}}]\noptions: {num_dev: 5}\n"
    "published: [{source: x, columns: [sst2, rte], model: b, rows: {lozo: [1, 2]}}]\n"
)


@fuzz
@given(name=st.sampled_from(sorted(TASKS)), places=st.lists(st.integers(0, 99), min_size=1, max_size=3), values=st.lists(junk, min_size=3))
def test_a_task_file_of_any_values_is_a_task_or_a_sentence(name: str, places: list[int], values: list[Any], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(yaml.dump(replaced(TASKS[name], places, values)))
    try:
        loader.load(tmp_path / "my.yaml")
    except ValueError as error:
        assert "my.yaml" in sentence(error)


@fuzz
@given(places=st.lists(st.integers(0, 99), min_size=1, max_size=3), values=st.lists(junk, min_size=3))
def test_a_grid_file_of_any_values_is_a_grid_or_a_sentence(places: list[int], values: list[Any], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(yaml.dump(replaced(GRID, places, values)))
    try:
        grid.load(tmp_path / "my.yaml")
    except ValueError as error:
        assert "my.yaml" in sentence(error)


@pytest.fixture(scope="module")
def parser() -> OptionParser:
    return OptionParser((ModelArguments, DataArguments, Scheme, ZOConfig), "zotune train")


@fuzz
@given(data=st.data())
def test_options_of_any_values_are_taken_or_a_sentence(data: st.DataObject, parser: OptionParser, tmp_path: Path) -> None:
    names = sorted(action.dest for action in parser._actions if action.dest not in ("config", "debug"))  # debug changes the whole process
    chosen = data.draw(st.dictionaries(st.sampled_from(names), junk, min_size=1, max_size=2))
    (tmp_path / "my.yaml").write_text(yaml.dump({"output_dir": "out", "use_cpu": True, **chosen}))
    try:
        parser.parse(["--config", str(tmp_path / "my.yaml")])
    except (ValueError, FileNotFoundError, ImportError) as error:
        assert str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["name", "files", "splits"])
@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "~/x", "..\\x", "C:\\x"])
def test_a_task_takes_rows_from_the_data_folder_only(key: str, path: str, tmp_path: Path) -> None:
    content = {**TASKS["sst2"], key: path if key == "name" else {"train": path}}
    (tmp_path / "my.yaml").write_text(yaml.dump(content))
    with pytest.raises(ValueError, match=f"{key!r} must be"):
        loader.load(tmp_path / "my.yaml")


# -- JSON Lines -----------------------------------------------------------------------------------------------------------------------


@fuzz
@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()), packed=st.booleans())
def test_any_bytes_are_rows_or_a_sentence(data: bytes, packed: bool, tmp_path: Path) -> None:
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data) if packed else data)):
        (tmp_path / name).write_bytes(content)
        try:
            rows = sources.read_jsonl(tmp_path / name)
        except ValueError as error:
            assert str(tmp_path / name) in sentence(error)
        else:
            assert all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": ' + b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "line 2 holds a number that cannot be read"),
        (b'{"a": "\\ud800"}', "line 2 holds half of a surrogate pair"),
        (b'{"a": "' + b"x" * 5000 + b'"}', "line 2 is longer than 1000 bytes"),
    ],
)
def test_a_line_that_breaks_the_reader_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    limits = {"longest": 1000} if "longer" in message else {}
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        sources.read_jsonl(tmp_path / "a.jsonl", **limits)
    sentence(caught.value)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}\n')
    assert sources.read_jsonl(tmp_path / "a.jsonl")[0] == {"a": "\U0001f600"}


# -- models, adapters and runs from elsewhere -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_model(folder / "model")
    save_data(folder)
    return folder


@pytest.fixture
def model_folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "model", tmp_path / "model"))


def load(folder: Path) -> Any:
    arguments = ModelArguments(str(folder))
    plan = plan_model(arguments, "zotune eval")
    load_tokenizer(plan, arguments)
    return load_model(plan, arguments, torch.device("cpu"))[0]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "pytorch_model.bin")


def with_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("import os\nos.mkdir('PWNED')\n")


def with_tokenizer_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (folder / "evil.py").write_text("import os\nos.mkdir('PWNED')\n")


def with_weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "away.safetensors")
    with safe_open(folder.parent / "away.safetensors", "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "../away.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (as_pickle, "holds weights as a pickle"),
    "code": (with_code, "needs code of its own: add --trust_remote_code"),
    "a tokenizer's code": (with_tokenizer_code, "needs code of its own: add --trust_remote_code"),
    "weights elsewhere": (with_weights_elsewhere, "outside of the folder"),
    "weights cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]), "cannot load a model"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot load a model"),
    "a header of exabytes": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "cannot load a model"),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), "cannot load a model"),
    "config of wrong types": (lambda f: edit(f / "config.json", hidden_size="x"), "cannot load a model"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot load a model"),
    "config of another size": (lambda f: edit(f / "config.json", hidden_size=32), "cannot load a model"),
    "tokenizer no object": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "cannot load a model"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_foreign_model_is_refused_and_runs_nothing(case: str, model_folder: Path) -> None:
    spoil, message = BAD_MODELS[case]
    load(model_folder)
    spoil(model_folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(model_folder)
    sentence(caught.value)


def test_code_beside_a_known_kind_of_model_is_not_run(model_folder: Path) -> None:
    edit(model_folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (model_folder / "evil.py").write_text("import os\nos.mkdir('PWNED')\n")
    assert type(load(model_folder)).__module__.startswith("transformers.")


@pytest.mark.parametrize("content", ["[]", "{}", "{", "[" * 100_000, '{"base_model_name_or_path": 3}'])
def test_an_adapter_that_names_no_base_model_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="names no base model"):
        plan_model(ModelArguments(str(tmp_path)), "zotune eval")


def test_an_adapter_of_pickles_is_refused(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter").mkdir()
    content = {"base_model_name_or_path": str(model_folder), "peft_type": "LORA", "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(content))
    torch.save(Evil(), tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(ValueError, match="adapters are loaded from safetensors only"):
        load_adapter(load(model_folder), tmp_path / "adapter")


PICKLES = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth",
           "rng_state_0.pth", "scaler.pt", "pytorch_model.bin.index.json"]  # fmt: skip
RUN: dict[str, Any] = {
    "max_steps": 4,
    "train_dataset": choice_rows(20),
    "forward_batching": "batched",
    "save_strategy": "steps",
    "save_steps": 2,
}


def test_pickles_in_a_run_folder_are_never_loaded(tmp_path: Path) -> None:
    """All the names that Hugging Face's Trainer would load by pickle, in the run's folder and in a checkpoint with its manifest renewed."""
    straight = trainer(tmp_path / "straight", **RUN)
    straight.train()
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(3)], **RUN).train()
    for place in (folder, folder / "checkpoint-2"):
        for name in PICKLES:
            (place / name).write_bytes(pickle.dumps(Evil()))
    storage.write_manifest(folder / "checkpoint-2")
    again = trainer(folder, tiny_llama(), **RUN)
    assert resume.checkpoint_of(folder, folder / "journal.zo", True, alone=True) == folder / "checkpoint-2"
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again.model), weights(straight.model))
    # Without its safetensors the checkpoint is none, whatever pickles stand beside.
    (folder / "checkpoint-2/model.safetensors").unlink()
    storage.write_manifest(folder / "checkpoint-2")
    fault = storage.problem(folder / "checkpoint-2", folder / "journal.zo")
    assert fault is not None and "holds no weights" in fault


def test_a_link_out_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[StopAt(3)], **RUN).train()
    path = folder / "checkpoint-2" / contents.STATE_TENSORS
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    fault = storage.problem(path.parent, folder / "journal.zo")
    assert fault is not None and "outside of the folder" in fault


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('PWNED') }}",
        "{% for n in range(10 ** 9) %}x{% endfor %}",
        "{{ undefined.attribute }}",
        "{% if %}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, model_folder: Path) -> None:
    tokenizer = load_tokenizer(plan_model(ModelArguments(str(model_folder)), "zotune train"), ModelArguments(str(model_folder)))
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template"):
        scored_characters(
            ChatTemplate(tokenizer), chat_of({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]})
        )


RUN_FILES: dict[str, Any] = {
    "no object": [],
    "no data": {"data_arguments": None},
    "no dtype": {"dtype": "load"},
    "no scheme": {"scheme": {"nothing": 1}},
    "no classes": {"classes": 3},
}


@pytest.fixture(scope="module")
def trained(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zotune.cli.main import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--model_name_or_path", str(good / "model"), "--task", "sst2", "--data_dir", str(good / "data"), "--output_dir", str(folder)]
    assert main(["train", *words, "--max_steps", "2", "--learning_rate", "1e-3"]) == 0
    return folder


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_run_file_of_another_kind_is_named(case: str, trained: Path, good: Path, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    path = folder / "zotune_run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **RUN_FILES[case]} if RUN_FILES[case] else []))
    if case in ("no object", "no data"):
        result: Result = run_command(capsys, "eval", "--model_name_or_path", str(folder))
    else:
        result = run_command(capsys, "replay", str(good / "model"), str(folder), "--output_dir", "out")
    assert (result.code, result.err.count("\n")) == (2, 1) and "Traceback" not in result.err
    assert str(folder) in result.err and not Path("out").exists()


def test_fuzzing_covers_more_than_refusals(real: bytes, tmp_path: Path) -> None:
    """The journal that the others alter is one that replays."""
    (tmp_path / "j").write_bytes(real)
    assert replay(toys.classifier(), tmp_path / "j").steps == 4
