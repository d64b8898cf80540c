"""A GGUF file from Python: `zotune.load_gguf`, and what needs a backward pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zotune
from zotune import bundled
from zotune.baselines import FirstOrder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    from zotune.engines.gguf.convert import convert

    return convert(bundled.path("tiny-lm"), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "q4_0")


def test_a_file_is_a_model_and_its_tokenizer(tiny):
    model, tokenizer = zotune.load_gguf(tiny, n_threads=1, n_ctx=64)
    ids = torch.tensor([tokenizer("It was a joy.")["input_ids"]])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert model.config.max_position_embeddings == 64
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "It was a joy."


def test_an_adapter_of_the_file_is_added(tiny, tmp_path):
    from zotune.engines import write_adapter

    model, _ = zotune.load_gguf(tiny, n_threads=1)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    name, layer = next(iter(model.matrices.items()))
    layer.add(torch.ones(layer.out_features, 1), torch.ones(layer.in_features, 1), 1.0)
    trained = model(input_ids=ids).logits
    write_adapter(tmp_path / "adapter.gguf", model.engine.file, model.factors(), {"base": model.engine.digest()})
    again, _ = zotune.load_gguf(tiny, adapter=tmp_path / "adapter.gguf", n_threads=1)
    assert list(again.factors()) == [name]
    assert torch.equal(again(input_ids=ids).logits, trained) and not torch.equal(before, trained)


def test_a_missing_file_or_an_unknown_option_is_refused(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.gguf"):
        zotune.load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="no GGUF file"):
        zotune.load_gguf(tmp_path / "none")
    with pytest.raises(TypeError, match="threads"):
        zotune.load_gguf(tiny, threads=1)


def test_baselines_with_a_backward_pass_are_refused(tiny):
    model, _ = zotune.load_gguf(tiny, n_threads=1)
    with pytest.raises(ValueError, match="fo-sgd needs a backward pass, and the engine of this model has none"):
        FirstOrder(model, "fo-sgd")


def test_without_the_extra_one_sentence_says_so(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code = "import sys; sys.modules['gguf'] = None; import zotune; zotune.load_gguf(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.gguf")], capture_output=True, text=True, timeout=100)
    assert done.stderr.splitlines()[-1].endswith('not installed here: pip install "zotune[gguf]".')
