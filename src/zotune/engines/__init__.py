"""Inference engines that compute the model: what they offer to training, and each of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.engines.engine import Engine, Row, Watch
    from zotune.engines.gguf.adapter import write_adapter
    from zotune.engines.gguf.file import GGUFFile
    from zotune.engines.llama_cpp.llama import LlamaCpp, LlamaOptions
    from zotune.engines.model import EngineModel

# Those of GGUF files import gguf, which is optional.
_NAMES = {
    "Engine": "engine",
    "EngineModel": "model",
    "GGUFFile": "gguf.file",
    "LlamaCpp": "llama_cpp.llama",
    "LlamaOptions": "llama_cpp.llama",
    "Row": "engine",
    "Watch": "engine",
    "write_adapter": "gguf.adapter",
}

__all__ = ["Engine", "EngineModel", "GGUFFile", "LlamaCpp", "LlamaOptions", "Row", "Watch", "write_adapter"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
