"""`zotune convert`: a checkpoint of transformers as a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.cli.parser import CommandParser
from zotune.engines.gguf.outtypes import OUTTYPES
from zotune.io.sizes import size_text
from zotune.training.quiet import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """Runs `zotune convert`."""
    parser = CommandParser(
        "zotune convert",
        "Writes a Llama-, Mistral-, Qwen2- or Qwen3-like checkpoint of transformers, weights and tokenizer, as a GGUF file for llama.cpp "
        "and Ollama. For other models there is llama.cpp's convert_hf_to_gguf.py.",
    )
    parser.add_argument("checkpoint", help="the checkpoint's folder")
    parser.add_argument("out", help="the GGUF file to write")
    parser.add_argument("--outtype", default="f16", metavar="TYPE", help=f"how weights are stored: {', '.join(OUTTYPES)} (default: f16)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there already")
    args = parser.parse(argv)
    from zotune.engines.gguf.convert import convert
    from zotune.engines.gguf.file import GGUFFile

    quiet_libraries()
    file = GGUFFile(convert(args.checkpoint, args.out, args.outtype, overwrite=args.overwrite))
    size = size_text(file.path.stat().st_size)
    print(f"{file.path}: {file.name}, {file.architecture}, {file.quantization}, {size}, a context of {file.context_length} tokens.")
    return 0
