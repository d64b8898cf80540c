"""Runs of models that classify images or sound, from a folder of files to a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from command_cases import Result, run_command, save_encoder
from family_cases import save_media_model, save_media_rows, write_tone
from zotune.tasks.media import MediaCollator
from zotune.tasks.media_files import read_sound

pytestmark = pytest.mark.filterwarnings("ignore:.*(no batched evaluation|with several weights at once)")
KINDS = {"vit": "image", "ast": "sound", "w2v": "sound"}
LOADERS = {"image": transformers.AutoModelForImageClassification, "sound": transformers.AutoModelForAudioClassification}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(capsys: pytest.CaptureFixture[str], *words: str, steps: int = 2) -> Result:
    files = ["--train_file", "train/metadata.csv", "--eval_file", "eval/metadata.csv", "--use_cpu", "--max_steps", str(steps)]
    return run_command(capsys, "train", "--model_name_or_path", "model", "--output_dir", "run", *files, *words)


@pytest.mark.parametrize("name", KINDS)
def test_a_head_is_trained_saved_and_evaluated(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    kind = KINDS[name]
    save_media_model(here / "model", name)
    save_media_rows(here, kind)
    result = trained(capsys, "--method", "mezo", "--learning_rate", "1e-2")
    assert result.code == 0, result.err
    model = LOADERS[kind].from_pretrained("run")
    assert list(model.config.id2label.values()) == (["green", "red"] if kind == "image" else ["high", "low"])
    after = json.loads(Path("run/summary.json").read_text())["after"]
    assert run_command(capsys, "eval", "--model_name_or_path", "run", "--use_cpu", "--output_file", "found.json").code == 0
    found = json.loads(Path("found.json").read_text())["metrics"]
    assert {key: found[key] for key in ("loss", "accuracy", "f1")} == pytest.approx({key: after[key] for key in ("loss", "accuracy", "f1")})
    assert run_command(capsys, "replay", "model", "run/journal.zo", "--output_dir", "again", "--use_cpu").code == 0
    one, other = load_file("run/model.safetensors"), load_file("again/model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    processors = transformers.AutoImageProcessor if kind == "image" else transformers.AutoFeatureExtractor
    assert processors.from_pretrained("again").to_dict() == processors.from_pretrained("model").to_dict()
    assert run_command(capsys, "export", "run", "--to", "merged", "--output_dir", "whole").code == 0
    processors.from_pretrained("whole")


def test_a_lora_adapter_holds_the_new_head_and_learns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    save_media_model(here / "model", "vit")
    save_media_rows(here, "image", 32, 16)
    result = trained(capsys, "--scheme", "lora", steps=30)
    assert result.code == 0, result.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.7 and summary["after"]["accuracy"] > 0.9
    base = transformers.AutoModelForImageClassification.from_pretrained("model", num_labels=2)
    model = PeftModel.from_pretrained(base, "run").eval()
    collate = MediaCollator("image-classifier", transformers.AutoImageProcessor.from_pretrained("run"))
    rows = [line.split(",") for line in Path("eval/metadata.csv").read_text().split()[1:]]
    batch = collate([{"file": f"eval/{name}", "label": ["green", "red"].index(label)} for name, label in rows])
    with torch.no_grad():
        right = model(pixel_values=batch["pixel_values"]).logits.argmax(dim=1) == batch["labels"]
    assert float(right.float().mean()) == pytest.approx(summary["after"]["accuracy"])


@pytest.mark.parametrize("name", ["vit", "w2v"])
def test_an_update_is_exported_as_an_adapter(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    save_media_model(here / "model", name)
    save_media_rows(here, KINDS[name])
    assert trained(capsys, "--method", "lozo", "--learning_rate", "1e-2", "--rank", "1").code == 0
    done = run_command(capsys, "export", "run", "--to", "peft", "--output_dir", "adapter")
    assert done.code == 0 and "Biases go along" in done.out, done.err
    assert float(done.out.partition("on made-up inputs, ")[2].split(". ")[0]) < 1e-3


def test_labels_of_several_kinds_are_learned_by_models_of_sound(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_media_model(here / "model", "w2v")
    save_media_rows(here, "sound")
    for part in ("train", "eval"):
        lines = Path(part, "metadata.csv").read_text().split()[1:]
        rows = [(name, 1.0 if label == "high" else -1.0) for name, label in (line.split(",") for line in lines)]
        Path(part, "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},{value}\n" for name, value in rows))
    assert trained(capsys, "--method", "mezo", "--learning_rate", "1e-2").code == 0
    assert {"pearson", "mse"} <= json.loads(Path("run/summary.json").read_text())["after"].keys()


def test_sound_is_read_at_the_models_rate_with_its_channels_mean(tmp_path: Path) -> None:
    write_tone(tmp_path / "one.wav", 440.0, 0.25, rate=16000, channels=2)
    samples = read_sound(tmp_path / "one.wav", 8000)
    assert samples.shape == (2000,) and samples.dtype == np.float32
    wanted = 8000 / 32768 * np.sin(2 * np.pi * 440.0 * np.arange(2000) / 8000)
    assert np.abs(samples - wanted)[200:-200].max() < 5e-3


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("vit", ["--task", "sst2"], "vit classifies images, and needs rows with file_name and label: leave --task out"),
        ("vit", ["--max_length", "8"], "max_length would have no effect: it is of texts"),
        ("vit", ["--objective", "lm"], "leave the objective 'lm' out"),
        ("vit", ["--train_file", "texts.jsonl"], "needs rows with file_name and label: texts.jsonl has text, label"),
        ("vit", ["--train_file", "lost.csv"], "there is no image "),
        ("vit", ["--train_file", "text.csv"], "is no image that can be read"),
        ("w2v", ["--train_file", "text.csv"], "is no sound that can be read"),
        ("w2v", ["--train_file", "outside.csv"], "is outside of the folder"),
        ("encoder", [], "train/metadata.csv names files of images or sound, and bert reads text"),
    ],
)
def test_what_makes_no_sense_is_refused(here: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str], reason: str) -> None:
    if name == "encoder":
        save_encoder(here / "model")
    else:
        save_media_model(here / "model", name)
    save_media_rows(here, KINDS.get(name, "image"), 4, 4)
    Path("texts.jsonl").write_text('{"text": "a", "label": "b"}\n')
    Path("x.txt").write_text("no image")
    for file, named in (("lost", "no.png"), ("text", "x.txt"), ("outside", "../x.txt")):
        Path(f"{file}.csv").write_text(f"file_name,label\n{named},red\n{named},green\n")
    result = trained(capsys, *words)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err
    assert not Path("run").exists()


def test_a_folder_without_a_processor_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_media_model(here / "model", "ast")
    save_media_rows(here, "sound", 4, 4)
    Path("model/preprocessor_config.json").unlink()
    result = trained(capsys)
    assert result.code == 2 and "has no processor of sounds that can be loaded" in result.err and result.err.count("\n") == 1


def test_huge_images_and_sounds_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zotune.tasks import media_files

    monkeypatch.setattr(media_files, "MOST_PIXELS", 100)
    monkeypatch.setattr(media_files, "MOST_SAMPLES", 100)
    Image.new("RGB", (20, 16)).save("a.png")
    write_tone(here / "a.wav", 440.0, 0.1)
    for read in (lambda: media_files.read_image("a.png"), lambda: media_files.read_sound("a.wav", 8000)):
        with pytest.raises(ValueError, match="more than 100"):
            read()
