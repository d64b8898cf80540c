"""docs/how-to/model_families.md, followed from top to bottom in an empty folder, with fewer steps, on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_cases import run_command, save_encoder
from docs_pages import DOCS, command_blocks, save_files
from family_cases import save_images, save_llava, save_media_model, save_media_rows, save_seq2seq

PAGE = DOCS / "how-to/model_families.md"
METRICS = {
    "ratings": "pearson",
    "answers": "token_f1",
    "similar": "accuracy",
    "words": "f1",
    "photos": "token_f1",
    "pets": "accuracy",
    "calls": "accuracy",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(one number for a batch|no batched evaluation|with several weights at once)")
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, part, place in (("image", "train", "pets"), ("sound", "eval", "calls")):
        save_media_rows(tmp_path / kind, kind, 4, 8)
        (tmp_path / kind / part).rename(place)
    save_files(PAGE, tmp_path)
    save_media_model(tmp_path / "my-vit", "vit")
    save_media_model(tmp_path / "my-wav2vec2", "w2v")
    save_encoder(tmp_path / "my-encoder")
    save_seq2seq(tmp_path / "my-t5", "t5")
    save_llava(tmp_path / "my-llava")
    save_images(tmp_path, 2, 1)
    Path("train").rename("photos")
    for block in command_blocks(PAGE):
        for words in block.commands if block.mark == "families" else []:
            short = ["--max_steps", "1", "--eval_steps", "1", "--method", "mezo", "--use_cpu"] if words[1] == "train" else ["--use_cpu"]
            result = run_command(capsys, *words[1:], *short)
            assert result.code == 0, result.err
    assert {name: json.loads(Path(f"runs/{name}/summary.json").read_text())["metric"] for name in METRICS} == METRICS
