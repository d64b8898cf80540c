"""Memory: the ledger counts what is alive, a dry run allocates what a real step does, deep models extrapolate shallow ones."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import OPTConfig

import paths
import toys
from memory_models import MODELS
from zotune import baselines
from zotune.baselines import catalog
from zotune.io.sizes import parse_size
from zotune.memory import KINDS, Ledger, Workload, config_of, estimate, measure, shipped
from zotune.memory.formulas import closed_form
from zotune.memory.process import growth
from zotune.memory.search import largest
from zotune.memory.shapes import depth_of, shallow
from zotune.memory.workload import elements_of
from zotune.rng import directions
from zotune.rng.directions import Directions, Key
from zotune.training.schemes import Scheme

ROOT = paths.ROOT

#: Bytes that a step takes whatever the model: the tables that directions are made of, and a few strips of a weight.
ANYWAY = 2**21


def plan(model: str, method: str, **options) -> Workload:
    return Workload(MODELS[model], catalog.get(method), **{"batch_size": 6, "sequence_length": 32, **options})


def test_the_ledger_counts_a_storage_once_until_it_is_freed():
    model = nn.Linear(100, 50, bias=False)
    with Ledger(model) as ledger:
        x = torch.ones(10, 100)
        view = x.view(100, 10)
        assert ledger.kept() == 4 * (5000 + 1000)
        y = model(x)
        assert ledger.kept() == 4 * (5000 + 1000 + 500)
        del x, view, y
    # autograd kept x for y; both are gone
    assert ledger.kept() == 4 * 5000
    assert ledger.peak().total == 4 * 6500
    assert ledger.peak().kinds["weights"] == 4 * 5000 and ledger.peak().kinds["activations"] == 4 * 500


PAIRS = [
    ("gpt2", "mezo", {}),
    ("gpt2", "lozo", {}),
    ("opt", "fo-adamw", {"dtype": torch.bfloat16}),
    ("bert", "zo-adamw", {}),
    ("llama", "fo-adamw", {"scheme": Scheme("lora", lora_r=2)}),
    ("opt", "mezo", {"scheme": Scheme("prefix", num_virtual_tokens=3)}),
]


@pytest.mark.parametrize(("model", "method", "options"), PAIRS)
def test_a_dry_run_allocates_what_a_real_step_does(model, method, options):
    predicted, measured = estimate(plan(model, method, **options)), measure(plan(model, method, **options))
    assert predicted.total == pytest.approx(measured.total, rel=0.05)
    for kind in KINDS:
        assert abs(predicted.kinds[kind] - measured.kinds[kind]) <= 0.05 * measured.total, kind


def test_kinds_are_what_the_step_keeps():
    numbers, _ = elements_of(plan("llama", "fo-adamw"))
    kinds = measure(plan("llama", "fo-adamw", batch_size=1, sequence_length=4)).kinds
    assert kinds["weights"] == pytest.approx(4 * numbers, rel=0.01)  # and a buffer of rotations
    assert kinds["optimizer state"] == pytest.approx(8 * numbers, rel=0.01)
    assert kinds["gradients"] >= 4 * numbers
    assert kinds["directions"] == 0
    inference = measure(plan("llama", "zero-shot")).kinds
    assert inference["gradients"] == inference["optimizer state"] == inference["directions"] == 0
    assert inference["logits"] >= 6 * 31 * 1800 * 4
    momentum = measure(plan("llama", "mezo-momentum")).kinds
    assert momentum["optimizer state"] == pytest.approx(4 * numbers, rel=0.02)


@pytest.mark.parametrize("method", ["mezo", "fo-adamw"])
def test_two_shallow_models_continue_to_a_deep_one(method):
    deep = Workload(shallow(MODELS["opt"], 5), catalog.get(method), batch_size=3, sequence_length=24)
    whole, continued = estimate(deep, exact=True), estimate(deep)
    assert continued.total == pytest.approx(whole.total, rel=0.01)
    assert continued.kinds["weights"] == whole.kinds["weights"]


def test_a_dry_run_leaves_no_trace():
    key = Key(0, 0, 0, "w")
    before = Directions("gaussian").draw(key, (40, 40))
    state, loop = torch.get_rng_state(), directions.for_blocks
    estimate(plan("gpt2", "lozo"))
    assert torch.equal(Directions("gaussian").draw(key, (40, 40)), before)
    assert torch.equal(torch.get_rng_state(), state) and directions.for_blocks is loop


#: Options that repeat what a dry run does already: more of the same forwards.
FEW = {"num_directions": 2, "interval": 2, "anchor_batches": 1, "examples": 8, "rank": 64, "probes": 1}


@pytest.mark.filterwarnings("ignore:this model's attention kernel has no forward derivative")
@pytest.mark.parametrize("name", [*toys.names(), *baselines.names()])
def test_every_method_has_a_dry_run(name):
    """No method reads a number that a fake tensor does not have."""
    small = Workload(shallow(MODELS["llama"], 1), catalog.get("mezo"), batch_size=4, sequence_length=8)
    known = catalog.get(name).options
    few = {option: min(most, known[option]) for option, most in FEW.items() if isinstance(known.get(option), int)}
    elements, _ = elements_of(small)
    assert estimate(small.with_(method=catalog.get(name, **few))).total > 4 * elements


def test_a_head_made_before_it_is_tied_is_no_memory_of_steps():
    wide = OPTConfig(**{**MODELS["opt"].to_dict(), "vocab_size": 150_000})  # above 32 MB, which are returned to the system at once
    workload = Workload(wide, catalog.get("zero-shot"), batch_size=1, sequence_length=4)
    elements, largest = elements_of(workload)
    assert growth(workload) < 4 * (elements + largest / 2)


# -- models ---------------------------------------------------------------------------------------------------------------------------


def test_shipped_shapes_have_the_papers_numbers_of_parameters():
    published = {"opt-125m": 0.125, "opt-1.3b": 1.3, "opt-2.7b": 2.7, "opt-6.7b": 6.7, "opt-13b": 13, "opt-30b": 30, "opt-66b": 66,
                 "roberta-large": 0.355, "Llama-2-7b-hf": 6.7, "Llama-2-13b-hf": 13, "Llama-2-70b-hf": 69}  # fmt: skip
    for name, billions in published.items():
        work = Workload(config_of(name), catalog.get("mezo"))
        assert elements_of(work)[0] / 1e9 == pytest.approx(billions, rel=0.04), name
    assert set(published) <= {each.rpartition("/")[2] for each in shipped()}


def test_a_shallow_config_leaves_the_original_alone():
    config = MODELS["opt"]
    assert depth_of(shallow(config, 3)) == 3 and depth_of(config) == 1


def test_a_config_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a model's config\.json"):
        config_of(str(tmp_path / "x.json"))


# -- what fits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "limit"), [(7, 200), (1, 50_000), (1000, 1999), (3, 3)])
def test_the_largest_that_fits(slope, limit):
    calls = []

    def need(n):
        calls.append(n)
        return slope * n + n * n // 1000

    found = largest(need, limit, most=100_000)
    assert need(found) <= limit if found else need(1) > limit
    assert need(found + max(1, found // 50) + 1) > limit or found >= 98_000
    assert len(calls) < 40


def test_sizes_are_read_as_written():
    assert parse_size("24GB") == 24 * 10**9 and parse_size("1.5 GiB") == 3 * 2**29
    for wrong in ("24 cards", "", "-3GB", "0GB"):
        with pytest.raises(ValueError, match="such as 24GB"):
            parse_size(wrong)


@pytest.mark.parametrize("method", ["mezo-adam", "lozo", "fo-adamw", "zero-shot"])
def test_a_workload_survives_json(method):
    written = plan("llama", method, scored=3, dtype=torch.bfloat16, scheme=Scheme("lora", lora_r=4))
    read = Workload.from_json(written.to_json())
    assert type(read.config) is type(written.config) and read.config.to_dict() == written.config.to_dict()
    assert read.to_json() == written.to_json() and read.scheme == written.scheme and read.dtype is torch.bfloat16


def test_closed_formulas():
    # |x| = 4000 bytes, |a| = 2 * 500
    assert closed_form("fo-sgd", 1000, 100, 500) == 4000 + max(500 + 2000, 4000)
    assert closed_form("fo-adamw", 1000, 100, 8000) == 4000 + (8000 + 2000) + 8000
    assert closed_form("mezo", 1000, 100, 0) == 2000 + 200
    assert closed_form("mezo", 1000, 100, 0, half=False) == 4000 + 400
    assert closed_form("lozo", 1000, 100, 0) is None


def test_lenets_five_published_figures():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import lenet_memory
    finally:
        sys.path.remove(str(ROOT / "examples"))
    images, labels = torch.zeros(lenet_memory.BATCH, 1, 28, 28), torch.zeros(lenet_memory.BATCH, dtype=torch.int64)
    found = {name: f"{size:.3f}" for name, size in lenet_memory.textbook((images, labels)).items()}
    assert found == {"parameters": "0.169", "gradients": "0.169", "activations": "2.292", "data": "0.384", "optimizer state": "0.339"}
    peak = lenet_memory.at_peak("mezo", (images, labels))
    adam = lenet_memory.at_peak("fo-adamw", (images, labels))
    assert "gradients" not in peak and "optimizer state" not in peak
    assert adam["optimizer state"] == pytest.approx(0.339, abs=1e-3) and adam["activations"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_low_rank_take_the_memory_of_inference(dtype):
    """The first one, which compares side paths with whole weights, and a fold too, however large the vocabulary."""
    wide = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 512, "vocab_size": 20_000}
    config = OPTConfig(**{**MODELS["opt"].to_dict(), **wide})
    shape = {"batch_size": 4, "sequence_length": 48, "scored": 1, "dtype": dtype, "forward_batching": "sequential"}
    inference = measure(Workload(config, catalog.get("zero-shot"), **shape)).total
    for interval in (1, 50):
        split = measure(Workload(config, catalog.get("lozo", interval=interval), **shape))
        assert split.total - split.kinds["optimizer state"] <= 1.03 * inference + ANYWAY


def test_guided_phases_keep_a_byte_or_two_per_sampled_element():
    """Of a text four positions in a byte a number, for layers that write to the hidden state; those of one layer at a time in four."""
    shape = {"batch_size": 64, "sequence_length": 32, "scored": 1, "forward_batching": "sequential"}
    few, many = (measure(Workload(MODELS["opt"], catalog.get("lozo-g", examples=n), **shape)).total for n in (4096, 8192))
    widths = MODELS["opt"].hidden_size, MODELS["opt"].ffn_dim
    assert many - few == pytest.approx(4096 * 4 * (sum(widths) + 4 * max(widths)), rel=0.25)  # scored ones are 256 at most


def test_what_is_kept_on_the_host_is_none_of_an_accelerators():
    """On a CPU it counts, see above."""
    shape = {"batch_size": 64, "sequence_length": 32, "scored": 1, "forward_batching": "sequential"}
    few, many = (estimate(Workload(MODELS["opt"], catalog.get("lozo-g", examples=n), **shape), accelerator=True) for n in (256, 512))
    assert many.total == pytest.approx(few.total, rel=1e-3)


def test_an_anchor_is_a_copy_of_the_weights_where_they_are_trained_in_full():
    """Of low-rank methods the matrices' copy is on the host, which counts where the model is there too."""
    numbers, _ = elements_of(plan("gpt2", "mezo"))
    small = {method: plan("gpt2", method, batch_size=1, sequence_length=4) for method in ("mezo", "lozo")}
    for workload in small.values():
        state = [measure(workload.with_(anchor_decay=decay)).kinds["optimizer state"] for decay in (0.0, 1.0)]
        assert state[1] - state[0] == pytest.approx(4 * numbers, rel=0.04)
    away = estimate(small["lozo"].with_(anchor_decay=1.0), accelerator=True).kinds["optimizer state"]
    assert away < state[0] + 0.1 * 4 * numbers


def test_later_phases_of_a_method_count_too() -> None:
    """LOZO-G's first turns evaluate a batch at one point, LOZO-E's at four at once."""
    workload = Workload(MODELS["opt"], catalog.get("lozo-g"), batch_size=4, sequence_length=32, forward_batching="batched")
    guided, plain = (estimate(workload.with_(method=catalog.get(name))) for name in ("lozo-g", "lozo-e"))
    assert guided.total >= 0.99 * plain.total
