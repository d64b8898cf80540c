"""An Ollama Modelfile for a GGUF model with an adapter: :func:`modelfile`."""

from __future__ import annotations

import os

from zotune.engines.gguf.file import GGUFFile

#: The context that Ollama takes where a Modelfile does not say.
DEFAULT_CONTEXT = 4096


def modelfile(file: GGUFFile, adapter: str | os.PathLike[str] = "./adapter.gguf", *, chat: bool = False) -> str:
    """The text of a Modelfile, for `ollama create NAME -f Modelfile`.

    Args:
        file: the base model. Ollama takes one file: of a split model the text says how to merge it.
        adapter: its path from the Modelfile's folder.
        chat: whether prompts go through the model's chat template, as when the adapter was trained on chats; else they are taken as they
            are.

    Raises:
        ValueError: a path has characters that a Modelfile cannot hold.
    """
    lines = ["# ollama create NAME -f Modelfile"]
    base = file.path.absolute()
    if len(file.paths) > 1:
        merged = base.with_name(base.name.split("-00001-of-")[0] + ".gguf")
        lines.append(f"# Ollama takes one file: llama-gguf-split --merge {_quoted(base)} {_quoted(merged)}")
        base = merged
    lines += [f"FROM {_quoted(base)}", f"ADAPTER {_quoted(adapter)}"]
    if not chat:
        lines.append("TEMPLATE {{ .Prompt }}")
    if file.context_length < DEFAULT_CONTEXT:
        lines.append(f"PARAMETER num_ctx {file.context_length}")
    return "\n".join(lines) + "\n"


def _quoted(path: str | os.PathLike[str]) -> str:
    """A path as Ollama reads it: between quotes, of which it takes off the outer two, where it has spaces or quotes."""
    text = os.fspath(path)
    if not text.isprintable():
        raise ValueError(f"the path {text!r} has a character that Ollama's Modelfile cannot hold: move the file.")
    return f'"{text}"' if any(mark in text for mark in ' "') else text
