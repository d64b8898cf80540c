"""A GGUF file from Python: :func:`load_gguf`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.engines.model import EngineModel


def load_gguf(
    path: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None, tokenizer: Any = None, **options: Any
) -> tuple[EngineModel, Any]:
    """The model of a GGUF file, computed by llama.cpp, and its tokenizer, with the token ids of llama.cpp.

    Args:
        path: the file, any part of a split one, or the folder of a run that trained one.
        adapter: an adapter of this file that is added; of a run's folder it is the run's own.
        tokenizer: instead of the file's own: a folder or hub id.
        options: of llama.cpp (:class:`zotune.engines.LlamaOptions`).

    Raises:
        ValueError: the extra ``zotune[gguf]`` is not installed, the file or the adapter is refused, or the tokenizer reads text otherwise
            than llama.cpp.
        FileNotFoundError: there is no such file.
        TypeError: llama.cpp has no such option here.
    """
    try:
        import gguf  # noqa: F401 - that it is missing is one sentence
    except ImportError:
        raise ValueError('GGUF files need gguf and llama.cpp, which are not installed here: pip install "zotune[gguf]".') from None
    import torch

    from zotune.engines.llama_cpp.llama import LlamaOptions
    from zotune.training.arguments import ModelArguments
    from zotune.training.loading import load_model, load_tokenizer, plan_model

    LlamaOptions(**options)
    name = os.fspath(path)
    args = ModelArguments(name, tokenizer_name=tokenizer, **options)
    if not args.is_gguf:
        raise ValueError(f"there is no GGUF file {name}.")
    plan = plan_model(args, "load_gguf")
    if adapter is not None:
        plan.adapter = os.fspath(adapter)
    found = load_tokenizer(plan, args)
    model: Any
    model, _ = load_model(plan, args, torch.device("cpu"))
    return model, found
