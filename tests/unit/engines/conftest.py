"""Small random models in torch and in llama.cpp, one of each kind for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # they need gguf and llama_cpp, which a test skips without
    from gguf_models import Pair
    from zotune.engines.model import EngineModel


def _pair(folder: pytest.TempPathFactory, kind: str, quantization: str, **options: bool) -> Pair:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from gguf_models import random_decoder, write_decoder

    return write_decoder(random_decoder(kind, **options), folder.mktemp("gguf") / "small.gguf", quantization)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Llama in float32."""
    return _pair(tmp_path_factory, "llama", "F32")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Qwen2 in float32, with biases of q, k and v and a head tied to the embedding."""
    return _pair(tmp_path_factory, "qwen2", "F32", tied=True)


@pytest.fixture(scope="session")
def llama_q8(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Llama in Q8_0."""
    return _pair(tmp_path_factory, "llama", "Q8_0")


@pytest.fixture(scope="session")
def _engine(llama: Pair) -> Iterator[EngineModel]:
    model = llama.engine()
    yield model
    model.engine.close()


@pytest.fixture
def model(_engine: EngineModel) -> EngineModel:
    """The Llama in llama.cpp, untrained."""
    from zotune.engines.model import EngineModel

    return EngineModel(_engine.engine)


@pytest.fixture
def opened() -> Iterator[Callable[..., EngineModel]]:
    """Opens a pair's file in llama.cpp with given options, until the test ends."""
    found: list[EngineModel] = []

    def open_file(pair: Pair, **options: int | str) -> EngineModel:
        found.append(pair.engine(**options))
        return found[-1]

    yield open_file
    for model in found:
        model.engine.close()
