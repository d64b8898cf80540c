"""A folder with GGUF files and a run that trained one, made once for the modules that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_cases import Result, run_command, save_data

Command = Callable[..., Result]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the bundled model with a chat template as GGUF in float32, the same in 8 bits, and one run of four steps."""
    from gguf_runs import TEMPLATE
    from zotune import bundled
    from zotune.engines.gguf.convert import convert

    folder = tmp_path_factory.mktemp("gguf-runs")
    save_data(folder)
    shutil.copytree(bundled.path("tiny-lm"), folder / "checkpoint")
    settings = json.loads((folder / "checkpoint/tokenizer_config.json").read_text())
    (folder / "checkpoint/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    convert(folder / "checkpoint", folder / "base.gguf", "f32")
    convert(bundled.path("tiny-lm"), folder / "q8.gguf", "q8_0")
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is the working one."""
    monkeypatch.chdir(place)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run_command(capsys, *map(str, words))


@pytest.fixture
def trained(place: Path, inside: None, command: Command) -> Path:
    """The folder of the run, which the first test trains."""
    from gguf_runs import RUN

    if not (place / "run").exists():
        result = command("train", *RUN, "--output_dir", "run")
        assert result.code == 0, result.err
        (place / "run.out").write_text(result.out)
    return Path("run")
