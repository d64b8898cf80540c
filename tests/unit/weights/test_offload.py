"""An offloaded model trains as one in memory does, bit for bit, whatever its architecture and wherever its weights are meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import paths
import toys
from command_cases import run_command, save_data, save_model
from zotune import ZerothOrder, methods
from zotune.io.execution import Execution, executing
from zotune.io.sizes import parse_size
from zotune.memory import Workload, estimate
from zotune.memory.offload_needs import needs
from zotune.optim.replay import replay
from zotune.training.checkpoint import contents, storage
from zotune.training.compatibility import refusal
from zotune.training.offloaded_loading import load
from zotune.weights import placement
from zotune.weights.digest import digest
from zotune.weights.offload import blocks, budget, direct_io, offload, stream_of
from zotune.weights.quantized_linear import dense_state, quantize

NAMES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "bert")


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return toys.transformer(name, dtype, **({"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}))


def train(model: nn.Module, method: str, steps: int = 6, journal=None, **options) -> tuple[list[float], ZerothOrder]:
    optimizer = ZerothOrder(model, toys.method(method, interval=3, **options), lr=1e-3, seed=3, journal=journal)
    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(toys.transformer_loss(model), toys.tokens())))
        losses += optimizer.last_report.coefficients.tolist()
    return losses, optimizer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_architectures_stream_from_their_files_unmodified(name, tmp_path):
    """Losses, coefficients and trained weights of LOZO, folds included, from the shards of save_pretrained."""
    model_of(name, torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    plain = kind.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    streamed = load(tmp_path / "model", kind, dtype=torch.bfloat16)
    stream = stream_of(streamed)
    assert len(stream.blocks) == 4
    assert digest(streamed) == digest(plain)
    expected, _ = train(plain, "lozo")
    found, _ = train(streamed, "lozo")
    assert found == expected
    assert_equal(weights(streamed), weights(plain))
    assert stream.traffic.written > 0


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize(("method", "dtype"), [("mezo", torch.bfloat16), ("lozo-m", torch.float16), ("mezo", torch.float32)])
def test_a_step_writes_what_it_would_have_written(to, method, dtype):
    """In full space every step's update waits for its block; none is left out when the weights are looked at."""
    plain, moved = model_of("llama", dtype), model_of("llama", dtype)
    offload(moved, to, resident=1)
    expected, _ = train(plain, method)
    found, _ = train(moved, method)
    assert found == expected
    assert_equal(weights(moved), weights(plain))


@pytest.mark.parametrize("method", ["lozo", "mezo"])
def test_a_checkpoint_continues_an_offloaded_run_exactly(method, tmp_path):
    """Saved between two folds, block by block, loaded into another stream; the end is that of the run in memory."""
    plain = model_of("llama", torch.bfloat16)
    expected, _ = train(plain, method, steps=8)
    first = model_of("llama", torch.bfloat16)
    offload(first, "disk")
    found, optimizer = train(first, method, steps=5)
    contents.save_model(tmp_path, first)
    contents.save_optimizer(tmp_path, optimizer)
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(weights(second), weights(first))
    third = model_of("llama", torch.bfloat16)
    offload(third, "disk")
    missing, unexpected = third.load_state_dict(weights(second))
    assert not missing and not unexpected
    resumed = ZerothOrder(third, toys.method(method, interval=3), lr=1e-3, seed=3)
    contents.load_optimizer(tmp_path, resumed)
    for _ in range(3):
        found.append(float(resumed.step(toys.transformer_loss(third), toys.tokens())))
        found += resumed.last_report.coefficients.tolist()
    assert found == expected
    assert_equal(weights(third), weights(plain))


# -- what is kept where -----------------------------------------------------------------------------------------------------------------


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_an_adapter_trains_on_a_base_that_is_only_read(to, tmp_path):
    plain, moved = lora(model_of("llama")), model_of("llama")
    offload(moved, to)
    moved = lora(moved)
    expected, _ = train(plain, "mezo")
    found, _ = train(moved, "mezo")
    assert found == expected
    assert_equal(weights(moved), weights(plain))
    stream = stream_of(moved)
    assert stream.traffic.written == 0
    contents.save_model(tmp_path, moved)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_half_the_bytes_for_a_base_that_is_only_read():
    """Weights kept in bfloat16 compute as ones rounded to it, and cannot be trained themselves."""
    rounded, moved = model_of("llama"), model_of("llama")
    stream = offload(moved, "cpu", dtype=torch.bfloat16)
    whole = sum(layout.size for layout in stream.store.layouts)
    assert sum(map(stream.store.size, range(4))) * 2 == whole
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "proj" in name:
                parameter.copy_(parameter.bfloat16())
    with pytest.raises(ValueError, match="fewer bits"):
        ZerothOrder(moved, "lozo", lr=1e-3)
    assert train(lora(moved), "mezo")[0] == train(lora(rounded), "mezo")[0]


def test_one_block_more_than_is_computed_with_is_in_memory():
    model = model_of("llama")
    stream = offload(model, "disk", prefetch=2)
    train(model, "lozo", steps=2)
    assert len(stream.pool.buffers) == 3
    largest = max(layout.size for layout in stream.store.layouts)
    assert sum(buffer.memory.numel() for buffer in stream.pool.buffers) <= 3 * direct_io.pages(largest)
    for name, parameter in model.named_parameters():
        if placement.offload_handle(parameter) is not None:
            assert parameter.untyped_storage().nbytes() == parameter.element_size(), name
    assert len([p for p in model.parameters() if placement.offload_handle(p) is not None]) == 4 * 7


def test_no_speed_is_told_where_nothing_was_read(monkeypatch):
    """The blocks that are read for it may be loaded already."""
    stream = offload(model_of("llama"), "disk")
    assert " GB/s" in stream.describe()
    monkeypatch.setattr(stream.pool, "wait_for_loads", lambda: None)
    monkeypatch.setattr(stream, "_run_pending", lambda block: None)
    assert "GB/s" not in stream.describe() and "4 blocks stream through" in stream.describe()


def test_a_pass_reads_every_block_once_whatever_is_evaluated():
    """Both points and all directions ride in one forward."""
    model = model_of("llama")
    stream = offload(model, "disk")
    optimizer = ZerothOrder(model, methods.lozo(num_directions=3, interval=50), lr=1e-3, forward_batching="batched")
    optimizer.step(toys.transformer_loss(model), toys.tokens())
    stream.flush()
    before = stream.traffic.blocks
    for _ in range(5):
        optimizer.step(toys.transformer_loss(model), toys.tokens())
    assert stream.traffic.blocks - before <= 5 * 4 + 1


@pytest.mark.parametrize("adapter", [False, True])
def test_one_pass_a_step_is_chosen_without_timing_others(adapter):
    """`auto` reads the model once a step from the second step on, however slow the clock says that is."""
    seconds = iter(range(0, 1 << 20, 7))
    model = model_of("llama")
    stream = offload(model, "disk")
    model = lora(model) if adapter else model
    optimizer = ZerothOrder(model, "mezo" if adapter else methods.lozo(interval=50), lr=1e-3)
    with executing(Execution(clock=lambda: float(next(seconds)))):
        optimizer.step(toys.transformer_loss(model), toys.tokens())
    stream.flush()
    assert optimizer.evaluator.batched and next(seconds) == 0
    before = stream.traffic.blocks
    for _ in range(3):
        optimizer.step(toys.transformer_loss(model), toys.tokens())
    assert stream.traffic.blocks - before <= 3 * 4 + 1


def test_a_failing_forward_leaves_stream_and_weights_as_found():
    model, plain = model_of("llama"), model_of("llama")
    offload(model, "disk")
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(toys.tokens())
    handle.remove()
    assert_equal(weights(model), weights(plain))
    assert train(model, "lozo", steps=2)[0] == train(plain, "lozo", steps=2)[0]


def test_a_state_dict_is_loaded_into_blocks_that_are_away():
    model, other = model_of("llama"), model_of("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    stream = offload(model, "disk")
    model.load_state_dict(other.state_dict())
    assert_equal(weights(model), weights(other))
    stream.bring_back()
    assert stream_of(model) is None
    assert_equal(weights(model), weights(other))
    with torch.no_grad():
        assert torch.equal(model(toys.tokens()).logits, other(toys.tokens()).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_and_a_stream_go_together(bits):
    def model() -> nn.Module:
        return quantize(toys.transformer("llama", hidden_size=32, intermediate_size=64), bits)

    plain, moved = model(), model()
    stream = offload(moved, "disk")
    assert {one.local for block in stream.blocks for one in block.tensors} == {"codes"}
    packed = sum(buffer.numel() for name, buffer in plain.named_buffers() if name.endswith("codes"))
    assert sum(map(stream.store.size, range(len(stream.blocks)))) < 1.5 * packed, "nothing else comes along"
    assert digest(plain) == digest(moved)
    assert train(moved, "lozo")[0] == train(plain, "lozo")[0]
    assert_equal(dense_state(moved), dense_state(plain))


# -- nothing is lost --------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch, toys
from zotune import ZerothOrder, methods
from zotune import offload
model = toys.transformer("llama", torch.bfloat16, num_hidden_layers=4)
offload(model, "disk")
optimizer = ZerothOrder(model, methods.mezo(), lr=1e-3, seed=3, journal=sys.argv[1])
for _ in range(3):
    optimizer.step(toys.transformer_loss(model), toys.tokens())
os.kill(os.getpid(), signal.SIGKILL)  # the last step's update of every block is still to be done
"""


def test_a_run_killed_with_updates_waiting_is_in_its_journal(tmp_path):
    where = os.pathsep.join(filter(None, [str(paths.HELPERS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "j")], env={**os.environ, "PYTHONPATH": where}, check=False)
    assert done.returncode == -signal.SIGKILL
    plain = model_of("llama", torch.bfloat16)
    optimizer = ZerothOrder(plain, methods.mezo(), lr=1e-3, seed=3)
    for _ in range(3):
        optimizer.step(toys.transformer_loss(plain), toys.tokens())
    again = model_of("llama", torch.bfloat16)
    stream = offload(again, "disk")
    loads = stream.traffic.blocks
    replay(again, tmp_path / "j")
    digests = stream.traffic.blocks
    assert_equal(weights(again), weights(plain))
    assert digests - loads <= 4 + 1  # the digest's pass: the updates of all steps wait for the next
    assert stream.traffic.blocks - digests <= 4 + 1


#: `zotune` with each of the lists of words, forked from a process that has imported it; their exit codes are printed.
CUT_OFF = """
import json, os, signal, sys
import zotune.cli.train
from zotune.cli.main import main
from zotune.optim.evaluator import Evaluator
from zotune.weights.offload import stream_of
evaluate = Evaluator.evaluate
def cut_off(self, context):
    if context.step == 5:  # the update of the step before, or the fold of the steps before, is still to be done
        assert any(block.pending for block in stream_of(self.forward.model).blocks), "nothing waits"
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(self, context)
Evaluator.evaluate = cut_off
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


def test_a_run_that_is_cut_off_on_disk_goes_on_along_its_journal(tmp_path, capsys, monkeypatch):
    """Killed with updates waiting: resumed from a checkpoint or from the base weights, and through the journal's tail, it ends in the
    weights of the run in memory that nobody touched, bit for bit."""
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--dtype", "bfloat16", "--max_steps", "8"]
    words += ["--learning_rate", "0.01", "--eps", "0.01", "--eval_steps", "4"]
    runs = {
        "mezo": [*words, "--method", "mezo", "--save_steps", "3"],
        "lozo": [*words, "--method", "lozo", "--save_steps", "100", "--interval", "5"],
    }
    disk = {method: [*run, "--offload", "disk", "--offload_dir", ".", "--output_dir", f"{method}-cut"] for method, run in runs.items()}
    done = subprocess.run([sys.executable, "-c", CUT_OFF, json.dumps([*disk.values()])], capture_output=True, text=True, check=False)
    assert done.stderr.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    for method, run in runs.items():
        cut, plain = f"{method}-cut", f"{method}-plain"
        assert run_command(capsys, *run, "--output_dir", plain).code == 0
        assert len(Path(cut, "journal.zo").read_bytes()) < len(Path(plain, "journal.zo").read_bytes())
        result = run_command(capsys, *disk[method], "--resume_from_checkpoint")
        assert result.code == 0, result.err
        assert Path(cut, "journal.zo").read_bytes() == Path(plain, "journal.zo").read_bytes()
        found, expected = (transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (cut, plain))
        assert_equal(found, expected)


# -- what is refused --------------------------------------------------------------------------------------------------------------------


def test_where_no_blocks_are_found_the_reason_is_told():
    with pytest.raises(ValueError, match="no repeated blocks are found in Sequential"):
        offload(toys.classifier())
    with pytest.raises(ValueError, match=r"no list of blocks 'model.layer'; its lists of modules are: model.layers"):
        offload(model_of("llama"), blocks="model.layer")
    with pytest.raises(ValueError, match="no matrix of its own"):
        offload(nn.Sequential(nn.ModuleList([nn.LayerNorm(8) for _ in range(3)])))
    assert len(blocks.find_blocks(model_of("gpt2"), "transformer.h")) == 4


def test_unreasonable_requests_are_refused():
    model = model_of("llama")
    with pytest.raises(ValueError, match="cpu or disk"):
        offload(model, "tape")
    with pytest.raises(ValueError, match="all that the model has"):
        offload(model, resident=4)
    with pytest.raises(ValueError, match="leave resident and prefetch out"):
        offload(model, resident=1, max_memory=1 << 40)
    offload(model)
    with pytest.raises(ValueError, match="offloaded already"):
        offload(model)
    with pytest.raises(ValueError, match="no backward pass"):
        model(toys.tokens()).logits.sum().backward()
    for method in ("hizoo", "sparse-mezo", "mezo-svrg"):
        with pytest.raises(ValueError, match=r"cannot be offloaded|lozo"):
            ZerothOrder(model, method, lr=1e-3)
        assert "lozo" in refusal(methods.get(method), model)
    assert refusal(methods.lozo(), model) is None


# -- the cap ----------------------------------------------------------------------------------------------------------------------------


def test_a_cap_keeps_as_many_blocks_as_fit():
    model = model_of("llama")
    block = sum(blocks.bytes_of(p) for p in model.model.layers[0].parameters() if p.dim() > 1)
    whole = sum(blocks.bytes_of(p) for p in model.parameters()) + sum(blocks.bytes_of(b) for b in model.buffers())
    rest = whole - 4 * block

    def under(resident: int) -> budget.OffloadPlan:
        size = (rest + 2 * block + resident * block) / (1 - budget.SPARE)
        return budget.plan_offload(model, int(size) + 2, torch.device("cpu"), taken=lambda device: 0)

    assert [under(n).resident for n in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="must be at least"):
        budget.plan_offload(model, int((rest + 2 * block) / (1 - budget.SPARE)) - 8, torch.device("cpu"), taken=lambda device: 0)


def test_a_cap_leaves_a_step_what_the_estimate_says():
    """A step's bytes are those of `zotune estimate` beside the weights; a half-precision block that is written brings its residuals."""
    model = model_of("llama", torch.bfloat16)
    plain = Workload(model.config, methods.lozo(), batch_size=2, sequence_length=8, dtype=torch.bfloat16)
    split = estimate(plain)
    assert needs([plain], accelerator=False) == budget.Needs(split.total - split.kinds["weights"], 1.0)
    written = needs([plain, plain.with_(method=methods.mezo(rounding="residual"))], accelerator=False)
    assert written.growth == 2.0
    moved = model_of("llama", torch.bfloat16)
    stream = offload(moved, "disk")
    before = max(layout.size for layout in stream.store.layouts)
    train(moved, "mezo", steps=1, rounding="residual")
    assert max(layout.size for layout in stream.store.layouts) == pytest.approx(written.growth * before, rel=0.05)

    base = budget.sizes(model)
    least = int((base[1] + written.step + 2 * 2 * base[2]) / (1 - budget.ROUNDING)) + 2
    found = budget.plan_offload(model, least, torch.device("cpu"), taken=lambda device: 0, needs=written)
    assert (found.resident, found.prefetch, found.step) == (0, 1, written.step) and found.total <= least
    with pytest.raises(ValueError, match=r", a step [0-9]"):
        budget.plan_offload(model, least - 64, torch.device("cpu"), taken=lambda device: 0, needs=written)


def test_amounts_of_memory():
    assert [parse_size(text) for text in ("18GiB", "500 MB", "1e9", "2k")] == [18 * 2**30, 500_000_000, 10**9, 2000]
    for text in ("much", "0GiB", "3 bananas", "-1GiB"):
        with pytest.raises(ValueError, match="no amount of memory"):
            parse_size(text)


# -- files ------------------------------------------------------------------------------------------------------------------------------


def test_spans_of_a_file_arrive_where_the_plan_says(tmp_path):
    """Whatever their offsets, and up to the last byte."""
    generator = random.Random(0)
    content = {str(tmp_path / name): generator.randbytes(100_001) for name in "ab"}
    for path, data in content.items():
        Path(path).write_bytes(data)
    spans = [(path, at, 3000) for path in content for at in (8, 3008, 40_000, 97_001)]
    generator.shuffle(spans)
    segments, places, size = direct_io.plan_reads(spans, gap=10_000)
    assert len(segments) < len(spans)
    room, reader = direct_io.page_aligned(size), direct_io.DirectFiles(chunk=8192)
    reader.read(segments, room)
    for (path, at, count), place in zip(spans, places, strict=True):
        assert bytes(room[place : place + count].tolist()) == content[path][at : at + count]
    reader.close()


def test_the_command_line_trains_from_disk_as_from_memory(tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    common = [
        "train",
        "--model_name_or_path",
        "my-model",
        "--task",
        "sst2",
        "--data_dir",
        "data",
        "--method",
        "lozo",
        "--interval",
        "3",
        "--max_steps",
        "6",
        "--save_steps",
        "4",
    ]
    for name, extra in (("a", []), ("b", ["--offload", "disk", "--max_memory", "64GiB", "--offload_dir", "."])):
        result = run_command(capsys, *common, *extra, "--output_dir", name)
        assert result.code == 0, result.err
    assert "blocks stream through" in result.out and "--max_memory 64 GiB fits" in result.out and "of it for a step" in result.out
    assert Path("a/journal.zo").read_bytes() == Path("b/journal.zo").read_bytes()
    result = run_command(capsys, *common, "--offload", "disk", "--output_dir", "b", "--resume_from_checkpoint", "b/checkpoint-4")
    assert result.code == 0, result.err
    found, expected = (transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in "ba")
    assert_equal(found, expected)
    for wrong, said in (
        (["--max_memory", "1GiB"], "--offload"),
        (["--offload", "cpu", "--use_cpu"], "--offload cpu needs a GPU"),
        (["--offload", "disk", "--method", "fo-sgd"], "backward"),
        (["--quantize", "int8", "--load_best_model_at_end", "--save_only_model", "--eval_steps", "2"], "of its checkpoints: leave"),
    ):
        words = [word for word in common if word not in ("--interval", "3")] if "fo-sgd" in wrong else common
        result = run_command(capsys, *words, *wrong, "--output_dir", "c")
        assert result.code == 2 and said in result.err, result.err
    result = run_command(capsys, *common, "--quantize", "int8", "--output_dir", "d")
    assert result.code == 0, result.err
    result = run_command(capsys, *common, "--quantize", "int8", "--output_dir", "d", "--resume_from_checkpoint", "d/checkpoint-4")
    assert result.code == 0, result.err
    for run in ("a", "d"):  # rebuilt from disk, in the bits of the run
        result = run_command(capsys, "replay", "my-model", run, "--output_dir", f"again-{run}", "--offload", "disk")
        assert result.code == 0, result.err
        found, expected = (transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (f"again-{run}", run))
        assert_equal(found, expected)
    for wrong, said in ((["--offload", "disk", "--merge"], "leave --offload out"), (["--max_memory", "1GiB"], "--offload")):
        result = run_command(capsys, "replay", "my-model", "a", "--output_dir", "e", *wrong)
        assert result.code == 2 and said in result.err, result.err
    result = run_command(capsys, "merge", "my-model", "d", "--output_dir", "e")
    assert result.code == 2 and "without --quantize" in result.err, result.err


@pytest.mark.parametrize("where", ["--quantize int8", "--offload disk", "--quantize int8 --offload disk"])
def test_the_best_checkpoint_comes_back(tmp_path, capsys, monkeypatch, where):
    """A run that ends with its best checkpoint, which is not the last, has that one's weights, factors beside codes included."""
    save_model(tmp_path / "my-model")
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model_name_or_path", "my-model", "--task", "sst2", "--data_dir", "data", "--method", "lozo", "--interval", "3"]
    words += ["--max_steps", "8", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "0", "--learning_rate", "3.0"]
    words += [
        *where.split(),
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "loss",
        "--greater_is_better",
        "true",
        "--output_dir",
        "a",
    ]
    result = run_command(capsys, *words)
    assert result.code == 0, result.err
    states = {path.name: contents.load_json(path / storage.TRAINER_STATE) for path in storage.checkpoints("a")}
    best = Path(states["checkpoint-8"]["best_model_checkpoint"]).name
    assert len(states) == 4 and best != "checkpoint-8", best
    found, expected, last = (
        transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("a", f"a/{best}", "a/checkpoint-8")
    )
    assert_equal(found, expected)
    assert any(not torch.equal(found[name], tensor) for name, tensor in last.items() if "q_proj" in name)


# -- an accelerator ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["lozo", "mezo"])
def test_on_a_card_a_stream_trains_as_resident_weights_do(to, method):
    plain, moved = model_of("llama", torch.bfloat16).cuda(), model_of("llama", torch.bfloat16)
    offload(moved, to, device="cuda")

    def run(model: nn.Module) -> list[float]:
        optimizer = ZerothOrder(model, toys.method(method, interval=3), lr=1e-3, seed=3)
        return [float(optimizer.step(toys.transformer_loss(model), toys.tokens().cuda())) for _ in range(6)]

    assert run(moved) == run(plain)
    assert_equal(weights(moved), weights(plain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_only_the_rooms_are_taken():
    model = toys.transformer("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    before = torch.cuda.memory_allocated()
    stream = offload(model, "cpu", device="cuda")
    with torch.no_grad():
        model(toys.tokens().cuda())
    rooms = 2 * direct_io.pages(max(layout.size for layout in stream.store.layouts))
    assert torch.cuda.memory_allocated() - before < 1.2 * rooms + (4 << 20)
