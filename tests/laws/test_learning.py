"""The main job on real input: pretrained models learn real sentences from forward passes."""

from __future__ import annotations

import copy

import pytest
import torch

import toys
import zotune
from zotune import bundled
from zotune.optim.calibration.gains import measurable

pytestmark = pytest.mark.slow


def mean_loss(loss_fn, batches) -> float:
    with torch.no_grad():
        return float(torch.cat([loss_fn(batch) for batch in batches]).mean())


def train(model, method: zotune.Method, lr: float | str, steps: int, objective: str, batches: list) -> tuple[float, float]:
    """Mean loss of the batches before and after steps on them in turn."""
    model.eval()
    loss_fn = zotune.objectives.objective(objective, model)
    before = mean_loss(loss_fn, batches)
    optimizer = zotune.ZerothOrder(model, method, lr=lr)
    for step in range(steps):
        optimizer.step(loss_fn, batches[step % len(batches)])
    return before, mean_loss(loss_fn, batches)


#: Learning rates that learn within the steps; the others are measured.
RATES = {
    "conmezo": 3e-4,
    "dizo": 3e-4,
    "jaguar-muon": 3e-2,
    "jaguar-sign": 2e-2,
    "loren": 1e-4,
    "lozo": 1e-3,
    "lozo-e": 1e-3,
    "lozo-g": 3e-2,
    "lozo-m": 1e-3,
    "mezo": 3e-4,
    "mezo-adam": 3e-3,
    "mezo-greedy": 3e-4,
    "mezo-gv": 3e-4,
    "mezo-momentum": 1e-4,
    "mezo-svrg": 1e-4,
    "p-gap": 1e-3,
    "pseuzo": 1e-4,
    "r-adazo": 3e-4,
    "randopt": 10.0,
    "zo-jaguar": 2e-2,
    "zo-mopi": 4e-1,
    "zo-muon": 2e-1,
}
#: What a test has time for, at most.
FEW = {"num_directions": 4, "history": 3, "anchor_batches": 2, "anchor_ratio": 1, "probes": 4}
#: Steps, and fewer of methods whose steps take long and go far.
STEPS, LONG_STEPS = 9, {"bszo": 4, "es": 4, "es-ranks": 4, "fzoo": 4, "hizoo-l": 4, "mezo-gv": 4, "randopt": 6, "zo-sgd-cons": 4}


@pytest.fixture(scope="session")
def language_model():
    """The bundled one without its last four blocks: two thirds of a forward's time, and nothing that is trained otherwise."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled.path("tiny-lm"), dtype=torch.float32, num_hidden_layers=2)


@pytest.fixture(scope="session")
def reviews(language_model):
    """A batch of the eight shortest reviews: a forward costs by its tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled.path("tiny-lm"))
    rows = bundled.path("reviews") / "train.jsonl"
    data = zotune.tasks.prepare(tokenizer, language_model.config, task="sst2", train_file=rows, objective="lm", parts=("train",))
    return data.collate_train(sorted(data.train, key=lambda row: data.collate_train([row])["input_ids"].numel())[:8])


@pytest.mark.parametrize("name", toys.names())
@pytest.mark.filterwarnings("ignore:this model.s attention kernel:UserWarning")  # forward-grad says so once
def test_the_bundled_language_model_learns_the_bundled_reviews(name, language_model, reviews):
    options = zotune.methods.options(name)
    few = {o: min(most, options[o]) for o, most in FEW.items() if isinstance(options.get(o), (int, float))}
    method = zotune.methods.get(name, **few)
    rate = RATES.get(name, "auto" if measurable(method) else method.lr)
    before, after = train(copy.deepcopy(language_model), method, rate, LONG_STEPS.get(name, STEPS), "lm", [reviews])
    assert after < 0.95 * before


@pytest.mark.parametrize("name", ["mezo", "lozo"])
def test_a_pretrained_encoder_learns_real_sentences(name, data_dir, sentence_encoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentence_encoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the classification head is new
        model = AutoModelForSequenceClassification.from_pretrained(sentence_encoder, num_labels=2, dtype=torch.float32)
    data = zotune.tasks.prepare(
        tokenizer, model.config, task="mr", data_dir=data_dir, objective="classifier", num_train=100, parts=("train",)
    )
    short = sorted(data.train, key=lambda row: data.collate_train([row])["input_ids"].numel())[:8]
    before, after = train(model, zotune.methods.get(name), 1e-3, 20, "classifier", [data.collate_train(short)])
    assert after < 0.95 * before
