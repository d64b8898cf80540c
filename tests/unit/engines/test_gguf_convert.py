"""Converted checkpoints: llama.cpp computes from the GGUF file what transformers computes from the checkpoint."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

from gguf_checkpoints import PAGE, save_checkpoint  # noqa: E402
from zotune import bundled  # noqa: E402
from zotune.cli.main import main  # noqa: E402
from zotune.engines.gguf.convert import convert  # noqa: E402
from zotune.engines.gguf.file import GGUFFile  # noqa: E402
from zotune.engines.gguf.outtypes import OUTTYPES  # noqa: E402


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's, with a float32 cache of keys and values."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    model.eval(ids)
    result = model.scores[: len(ids)].copy()
    model.close()
    return result


def reference(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    result = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    model.close()
    return result


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 32, "num_key_value_heads": 4},
    "llama-scaled": {"rope_parameters": LLAMA3},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"rms_norm_eps": 1e-3},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"shard": "50KB", "head_dim": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_of_f32_equal_transformers(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / "model", name.split("-")[0], **CASES[name])
    ids = np.random.default_rng(0).integers(3, 600, 48).tolist()
    expected = reference(folder, ids)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits(convert(folder, tmp_path / "m.gguf", "f32"), ids), expected, atol=2e-3)


def test_the_bundled_model_computes_the_same(tmp_path: Path) -> None:
    folder = bundled.path("tiny-lm")
    ids = AutoTokenizer.from_pretrained(folder)(PAGE)["input_ids"]
    path = convert(folder, tmp_path / "tiny-lm.gguf", "f32")
    assert tokens(path, [PAGE]) == [ids]
    np.testing.assert_allclose(logits(path, ids[:100]), reference(folder, ids[:100]), atol=2e-3)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "llama"])
def test_tokens_of_a_page_equal_the_checkpoints(tmp_path: Path, pre: str) -> None:
    folder = save_checkpoint(tmp_path / "model", pre=pre)
    words = AutoTokenizer.from_pretrained(folder)
    path = convert(folder, tmp_path / "m.gguf", "f32")
    draw = random.Random(0)
    alphabet = [*PAGE, "\u2003", "\u3000", "\u200b", "\x85", "ǅ", "ª", "</s>", "<tool>", "'s", "'LL"]
    mixed = [unicodedata.normalize("NFC", "".join(draw.choices(alphabet, k=draw.randint(1, 30)))) for _ in range(300)]
    texts = [PAGE, " two  spaces first", "a <tool> b", "x", *PAGE.splitlines(), *mixed]
    assert tokens(path, texts) == [words(text)["input_ids"] for text in texts]
    facts = GGUFFile(path).metadata
    assert facts["tokenizer.chat_template"] == "{{ messages }}"
    assert facts["tokenizer.ggml.pre"] == ("default" if pre == "llama" else pre)
    assert (facts["tokenizer.ggml.bos_token_id"], facts["tokenizer.ggml.add_bos_token"]) == (1, pre != "qwen2")


@pytest.mark.parametrize(
    ("outtype", "near"),
    [("f16", 1e-2), ("bf16", 2e-2), ("q8_0", 5e-2), ("q4_0", 0.35), ("q4_k_m", 0.35), ("q5_k_m", 0.2), ("q6_k", 0.15), ("iq4_nl", 0.35)],
)
def test_every_type_of_weights_computes_nearly_the_same(
    tmp_path: Path, whole: tuple[list[int], np.ndarray], outtype: str, near: float
) -> None:
    path, (ids, expected) = convert(bundled.path("tiny-lm"), tmp_path / "m.gguf", outtype), whole
    assert np.abs(logits(path, ids) - expected).mean() < near
    assert GGUFFile(path).quantization == outtype.upper()
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture(scope="module")
def whole() -> tuple[list[int], np.ndarray]:
    """A sentence, and its logits by the bundled model in float32."""
    folder = bundled.path("tiny-lm")
    ids = AutoTokenizer.from_pretrained(folder)("A film of great charm, and one to see again.")["input_ids"]
    return ids, reference(folder, ids)


def test_every_type_is_known_to_gguf() -> None:
    names = {kind.name.split("_", 1)[1].lower() for kind in gguf.LlamaFileType if "_" in kind.name}
    assert names >= set(OUTTYPES)


def test_rows_no_multiple_of_a_block_are_in_float16(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", intermediate_size=80)
    file = GGUFFile(convert(folder, tmp_path / "m.gguf", "q4_0"))
    kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["blk.0.attn_norm.weight"]) == ("F16", "Q4_0", "F32")
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("Q8_0", "Q4_0")


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_a_conversion_repeats_byte_for_byte(tmp_path: Path, outtype: str) -> None:
    files = [convert(bundled.path("tiny-lm"), tmp_path / name, outtype) for name in ("a.gguf", "b.gguf")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sliding_windows_of_some_layers_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ValueError, match="has sliding windows"):
        convert(folder, tmp_path / "m.gguf")


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "mistral", sliding_window=100)
    assert GGUFFile(convert(folder, tmp_path / "m.gguf")).context_length == 100


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["GPT2LMHeadModel"], "convert_hf_to_gguf"),
        ("architectures", ["LlamaForSequenceClassification"], "convert_hf_to_gguf"),
        ("num_attention_heads", "four", r"config\.json cannot be read"),
        ("architectures", [["LlamaForCausalLM"]], "convert_hf_to_gguf"),
        ("hidden_act", "gelu", "activation 'gelu'"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
            "'yarn' scaling",
        ),
        ("num_hidden_layers", 3, r"lacks the tensor model\.layers\.2"),
        ("num_hidden_layers", 10**9, "has 1000000000 layers by its config"),
        ("num_hidden_layers", 1, "holds the tensor model.layers.1"),
        ("intermediate_size", 128, "has the shape"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "quantized already"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    folder = save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words["pre_tokenizer"].update(add_prefix_space=True), "cuts text"),
        (lambda words: words.update(normalizer={"type": "Lowercase"}), "normalizes text"),
        (lambda words: words["added_tokens"][3].update(rstrip=True), "spaces or word borders"),
        (lambda words: words["model"].pop("merges"), "cannot be read"),
        (lambda words: words["model"].update(end_of_word_suffix="</w>"), "no plain BPE"),
    ],
)
def test_another_tokenizer_than_llama_cpps_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_checkpoint(tmp_path / "model")
    words = json.loads((folder / "tokenizer.json").read_text())
    change(words)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "m.gguf")


def test_pieces_that_never_merge_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", pre="llama")
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["merges"].pop(5)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"never merges parts.*convert_hf_to_gguf"):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(("number", "message"), [(-1e5, "beyond float16's.*bf16"), (float("nan"), "not finite")])
def test_numbers_that_cannot_be_stored_are_refused(tmp_path: Path, number: float, message: str) -> None:
    folder = save_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 4] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"output\.weight .*" + message):
        convert(folder, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*"))


def test_the_command_converts_and_spares_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(bundled.path("tiny-lm")), str(tmp_path / "a.gguf"), "--outtype", "q8_0"]
    assert main(words) == 0
    assert "a.gguf: tiny-lm" in capsys.readouterr().out
    before = (tmp_path / "a.gguf").read_bytes()
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words[:-1], "q4_0", "--overwrite"]) == 0
    assert (tmp_path / "a.gguf").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "a.gguf"], "hf download"),
        (["nowhere", "a.gguf", "--outtype", "q8"], "did you mean"),
        ([str(bundled.path("reviews")), "a.gguf"], "no config.json"),
        ([str(bundled.path("tiny-lm")), "."], "is a folder: name the file"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
