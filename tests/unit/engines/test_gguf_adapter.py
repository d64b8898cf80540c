"""Adapters: what llama.cpp computes with adapter.gguf is what PEFT computes with the folder, and what is read is what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from gguf_checkpoints import save_checkpoint
from gguf_files import random_tensors, write_model
from zotune.engines.gguf.adapter import peft_folder, read_adapter, write_adapter
from zotune.engines.gguf.convert import convert
from zotune.engines.gguf.file import GGUFFile
from zotune.engines.gguf.modelfile import modelfile

FACTS = {"base": "d1ge5t", "method": "lozo", "run": "runs/a", "note": ""}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def random_factors(file: GGUFFile, size: float = 0.2, rank: int = 3) -> Factors:
    """Of every matrix; the rank of every other one is lower."""
    rng = np.random.default_rng(1)
    ranks = {matrix.name: rank - place % 2 for place, matrix in enumerate(file.matrices)}
    return {
        matrix.name: tuple(size * rng.standard_normal((length, ranks[matrix.name]), dtype=np.float32) for length in matrix.shape)
        for matrix in file.matrices
    }  # type: ignore[return-value]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return GGUFFile(write_model(tmp_path_factory.mktemp("gguf") / "base model.gguf"))


@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 32})])
def test_llama_cpp_and_peft_compute_the_same_update(tmp_path: Path, kind: str, config: dict[str, object]) -> None:
    llama_cpp, peft = pytest.importorskip("llama_cpp"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = save_checkpoint(tmp_path / "model", kind, pre="qwen2", **config)
    file = GGUFFile(convert(folder, tmp_path / "m.gguf", "f32"))
    factors, ids = random_factors(file), np.random.default_rng(0).integers(3, 600, 32).tolist()
    write_adapter(tmp_path / "adapter.gguf", file, factors, FACTS)
    peft_folder(tmp_path / "peft", file, factors, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        base = model(torch.tensor([ids])).logits[0].numpy()
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
        expected = adapted(torch.tensor([ids])).logits[0].numpy()
    engine = llama_cpp.Llama(
        str(file.path), lora_path=str(tmp_path / "adapter.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False,
    )  # fmt: skip
    engine.eval(ids)
    np.testing.assert_allclose(engine.scores[: len(ids)], expected, atol=2e-3)
    engine.close()
    assert np.abs(expected - base).max() > 1


def test_an_adapter_is_read_as_it_was_written(file: GGUFFile, tmp_path: Path) -> None:
    factors = random_factors(file)
    write_adapter(tmp_path / "a.gguf", file, {name: (torch.from_numpy(left), right) for name, (left, right) in factors.items()}, FACTS)
    found, facts = read_adapter(tmp_path / "a.gguf", file)
    assert facts == FACTS
    assert set(found) == set(factors)
    for name, (left, right) in factors.items():
        np.testing.assert_array_equal(found[name][0], left)
        np.testing.assert_array_equal(found[name][1], right)


def test_rows_of_permuted_layers_are_in_the_files_order(file: GGUFFile, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    write_adapter(tmp_path / "a.gguf", file, {name: (np.arange(64.0)[:, None], np.ones((64, 1)))})
    import gguf

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert stored["blk.0.attn_q.weight.lora_b"][:4, 0].tolist() == [0, 8, 1, 9]  # 4 heads of 16 rows


def test_the_same_factors_give_the_same_bytes(file: GGUFFile, tmp_path: Path) -> None:
    factors = random_factors(file)
    write_adapter(tmp_path / "a.gguf", file, factors, FACTS)
    write_adapter(tmp_path / "b.gguf", file, dict(reversed(factors.items())), dict(reversed(FACTS.items())))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for name in ("p", "q"):
        peft_folder(tmp_path / name, file, factors)
    for path in (tmp_path / "p").iterdir():
        assert path.read_bytes() == (tmp_path / "q" / path.name).read_bytes()


def test_alpha_of_a_foreign_adapter_scales_its_factors(file: GGUFFile, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.1.ffn_down.weight.lora_a", np.ones((2, 96), dtype=np.float16))
    writer.add_tensor("blk.1.ffn_down.weight.lora_b", np.ones((64, 2), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    factors, facts = read_adapter(tmp_path / "a.gguf", file)
    left, right = factors["model.layers.1.mlp.down_proj"]
    assert (left @ right.T == 8).all() and facts == {}


def test_the_peft_folder_names_layers_shortly_where_it_can(file: GGUFFile, tmp_path: Path) -> None:
    factors = random_factors(file)
    peft_folder(tmp_path / "all", file, factors)
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    name = "model.layers.1.mlp.up_proj"
    peft_folder(tmp_path / "one", file, {name: factors[name]})
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == [name]


def test_factors_that_do_not_fit_are_refused(file: GGUFFile, tmp_path: Path) -> None:
    name, ones = "model.layers.0.mlp.up_proj", np.ones
    cases = {
        "factors of one matrix at least": {},
        "has no trainable matrix": {"blk.0.attn_q": (ones((64, 1)), ones((64, 1)))},
        r"shapes \(96, 1\) and \(64, 2\)": {name: (ones((96, 1)), ones((64, 2)))},
        r"shapes \(64, 1\)": {name: (ones((64, 1)), ones((96, 1)))},
        r"shapes \(96, 0\)": {name: (ones((96, 0)), ones((64, 0)))},
        "not finite": {name: (np.full((96, 1), np.nan), ones((64, 1)))},
    }
    for message, factors in cases.items():
        with pytest.raises(ValueError, match=message):
            write_adapter(tmp_path / "a.gguf", file, factors)
        with pytest.raises(ValueError, match=message):
            peft_folder(tmp_path / "peft", file, factors)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_refused(file: GGUFFile, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", file, random_factors(file))
    other = GGUFFile(write_model(tmp_path / "qwen.gguf", architecture="qwen2"))
    with pytest.raises(ValueError, match=r"of a llama, and .* a qwen2"):
        read_adapter(tmp_path / "a.gguf", other)
    narrow = {name: tensor for name, tensor in random_tensors().items() if not name.startswith("blk.1")}
    narrow["blk.0.attn_v.weight"] = np.ones((16, 64), dtype=np.float32)
    with pytest.raises(ValueError, match=r"changes blk\.1|of another model"):
        read_adapter(tmp_path / "a.gguf", GGUFFile(write_model(tmp_path / "narrow.gguf", narrow)))
    with pytest.raises(ValueError, match="is no LoRA adapter, but a model"):
        read_adapter(file.path, file)


def test_there_is_no_peft_folder_where_names_are_unknown(tmp_path: Path) -> None:
    file = GGUFFile(write_model(tmp_path / "m.gguf", architecture="falcon"))
    with pytest.raises(ValueError, match=r"not known what the checkpoint of a falcon calls blk\.0"):
        peft_folder(tmp_path / "peft", file, random_factors(file))


def test_a_damaged_adapter_never_raises_another_error(file: GGUFFile, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", file, random_factors(file), FACTS)
    whole, rng = (tmp_path / "a.gguf").read_bytes(), np.random.default_rng(0)
    for turn in range(60):
        content = bytearray(whole)
        for place in rng.integers(4, 2500, 2):
            content[place] = rng.integers(256)
        (tmp_path / "b.gguf").write_bytes(content[: rng.integers(4, len(content))] if turn % 4 == 0 else content)
        try:
            read_adapter(tmp_path / "b.gguf", file)
        except ValueError as error:
            assert len(str(error)) < 600


def test_a_modelfile_quotes_paths_and_names_the_context(file: GGUFFile) -> None:
    assert modelfile(file).splitlines() == [
        "# ollama create NAME -f Modelfile",
        f'FROM "{file.path}"',
        "ADAPTER ./adapter.gguf",
        "TEMPLATE {{ .Prompt }}",
        "PARAMETER num_ctx 128",
    ]
    assert "TEMPLATE" not in modelfile(file, chat=True)
    with pytest.raises(ValueError, match="move the file"):
        modelfile(file, "a\nSYSTEM x")


def test_a_modelfile_of_a_split_model_says_how_to_merge_it(tmp_path: Path) -> None:
    write_model(tmp_path / "small.gguf", split_max_tensors=10)
    lines = modelfile(GGUFFile(tmp_path / "small-00001-of-00003.gguf")).splitlines()
    assert lines[1].endswith(f"llama-gguf-split --merge {tmp_path}/small-00001-of-00003.gguf {tmp_path}/small.gguf")
    assert lines[2] == f"FROM {tmp_path}/small.gguf"
