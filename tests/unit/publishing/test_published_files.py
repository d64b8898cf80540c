"""What of a run is published: no path of its machine, and a whole copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from huggingface_hub import ModelCard

from command_cases import Result, run_command
from zotune.cli.verify import findings
from zotune.publishing import PublishedFiles, model_card

WORDS = ["--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--max_steps", "2", "--learning_rate", "1e-3"]
WORDS += ["--per_device_train_batch_size", "4", "--num_train", "8", "--num_dev", "0", "--num_eval", "4"]


class Published(NamedTuple):
    run: Path
    files: PublishedFiles


@pytest.fixture(params=["full", "lora"])
def published(request: pytest.FixtureRequest, workplace: Path, capsys: pytest.CaptureFixture[str]) -> Published:
    run = workplace / "run"
    done = run_command(capsys, "train", *WORDS, "--method", "lozo", "--scheme", request.param, "--output_dir", str(run))
    assert done.code == 0, done.err
    copy = workplace / "copy"
    copy.mkdir()
    return Published(run, PublishedFiles(run, copy, "acme/small"))


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".md", ".jinja"):
            yield path, path.read_text()


def test_a_published_run_is_whole_and_tells_no_paths(published: Published, workplace: Path) -> None:
    run, files = published
    files.add_card(model_card(files, "me/small-sst2", license="mit", dataset="acme/reviews"))
    for path, text in texts(files.folder):
        assert str(workplace) not in text, path
        assert "working_directory" not in text, path
    assert any(str(workplace) in text for _, text in texts(run))  # else the above would say nothing
    notes, faults = findings(files.folder)
    assert not faults
    assert any("model is whole" in note for note in notes)
    assert not [path for path in files.paths if "checkpoint-" in str(path)]
    card = ModelCard.load(files.folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("acme/small", "mit", "acme/reviews")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for when in ("before", "after"):
        assert found[f"accuracy {when} training"] == pytest.approx(files.summary[when]["accuracy"], abs=1e-5)
    assert "zotune replay acme/small run" in card.text


def test_an_unfinished_or_damaged_run_is_not_pushed(published: Published, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pushed(*words: str) -> Result:
        return run_command(capsys, "push", *words)

    run = published.run
    shown = pushed(str(run), "me/small", "--dry_run")
    assert shown.code == 0
    yaml.safe_load(shown.out.split("---")[1])
    refused = pushed(str(run), "me/small")  # tests run with HF_HUB_OFFLINE=1
    assert refused.code == 2
    assert "HF_HUB_OFFLINE" in refused.err
    assert "no name of a repository" in pushed(str(run), "me/small/too/long").err
    weights = next(path for path in sorted(run.glob("*.safetensors")))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is not whole" in pushed(str(run), "me/small").err
    (run / "summary.json").unlink()
    assert "has not ended" in pushed(str(run), "me/small").err
    assert "not the folder of a `zotune train` run" in pushed(str(workplace), "me/small").err
