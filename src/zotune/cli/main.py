"""The command `zotune`: runs a subcommand, and reports an error as one sentence and an exit code (:mod:`zotune.io.failures`).

Nothing heavy is imported here, so that `zotune --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from zotune.io.failures import explain
from zotune.io.suggest import nearest
from zotune.training.accelerate_launch import start_processes
from zotune.training.quiet import quiet_environment

#: Name -> (module:function, description).
COMMANDS = {
    "train": ("zotune.cli.train:main", "fine-tune a model with forward passes only"),
    "eval": ("zotune.cli.evaluate:main", "evaluate a model on a task"),
    "prompt": ("zotune.cli.prompt:main", "search a task's template and label words, before training"),
    "bench": ("zotune.cli.bench:main", "run a grid of methods, tasks and hyperparameters, and write its report"),
    "replay": ("zotune.cli.replay:main", "rebuild the trained weights from the base model and a run's journal"),
    "influence": ("zotune.cli.influence:main", "list the training examples by how much they changed a validation loss"),
    "orders": ("zotune.cli.orders:main", "tell what other orders of a run's examples would have given, without training again"),
    "merge": ("zotune.cli.merge:main", "average runs of one base model, from their journals, into one model"),
    "export": ("zotune.cli.export:main", "write a finished run as an adapter of PEFT, a whole model, or a GGUF file"),
    "convert": ("zotune.cli.convert:main", "write a checkpoint as a GGUF file, for llama.cpp and Ollama"),
    "report": ("zotune.cli.report:main", "write a page on one or several runs: results, curves, memory, options"),
    "push": ("zotune.cli.push:main", "push a finished run to the Hugging Face Hub: model, card, journal, curve"),
    "verify": ("zotune.cli.verify:main", "check a run's folder: journal, checkpoints, and whether it can go on"),
    "estimate": ("zotune.cli.estimate:main", "predict the memory of training, without reading a weight, or measure it"),
    "methods": ("zotune.cli.listing:methods", "list the methods, or describe one"),
    "tasks": ("zotune.cli.listing:tasks", "list the tasks, or describe one"),
    "quickstart": ("zotune.cli.quickstart:main", "fine-tune the bundled small model on bundled reviews, offline"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        argv: the words after `zotune`; the process's own when None.
    """
    _replace_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("ZOTUNE_TRACEBACK", "") not in ("", "0")
    if "--traceback" in words:
        words.remove("--traceback")
        show_traceback = True
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse's --help
        return int(end.code or 0)
    except BrokenPipeError:
        # The reader (`head`, `less`) has ended; Python must not fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        known = explain(error)
        if known is None:  # a bug, to be reported with its traceback
            raise
        message, code = known
        if show_traceback:
            traceback.print_exc()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")  # set by torchrun
    print(f"zotune{' (rank ' + os.environ.get('RANK', '?') + ')' if several else ''}: {message}", file=sys.stderr)
    return code


def _replace_closed_streams() -> None:
    """Standard streams that are closed become /dev/null: else a file of a run would get their number, and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"zotune {version('zotune')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean `zotune {near}`?" if near else f"there are {', '.join(COMMANDS)}."
        kind = "option" if name.startswith("-") else "command"
        raise ValueError(f"unknown {kind} {name!r}: {hint}")
    quiet_environment()
    if name == "train":
        start_processes()
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)(rest)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: zotune COMMAND [options]",
        "",
        "Fine-tune language models with forward passes only: the memory of inference, no backward pass.",
        "",
        "commands:",
        *(f"  {name:<{width}}{line}" for name, (_, line) in COMMANDS.items()),
        "",
        "options:",
        f"  {'--version':<13}print the version",
        f"  {'--traceback':<13}show where an error comes from (or set ZOTUNE_TRACEBACK=1)",
        "",
        "`zotune COMMAND --help` describes a command. To start: zotune quickstart",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
