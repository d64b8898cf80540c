"""`accelerate launch --cpu --num_processes N`: Accelerate starts one process, and leaves the others to `mpirun`; here they are started.

Accelerate hands N on to nobody. It stands in the words of the process that started this one, or in Accelerate's file of defaults.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import PurePath
from typing import NamedTuple

#: What a launcher tells a process of several: torchrun, then the implementations of MPI, as Accelerate reads them.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Asked(NamedTuple):
    """What `accelerate launch` was asked for, which has started this process alone."""

    processes: int
    machines: int


def asked() -> Asked | None:
    """What `accelerate launch` was asked for, where it started this process alone in place of several; else None."""
    if "MASTER_ADDR" not in os.environ or any(name in os.environ for name in WORLD):
        return None  # Accelerate sets the first for several processes
    import psutil

    parent = psutil.Process().parent()
    try:
        words = [] if parent is None else _after_launch(parent.cmdline())
    except psutil.Error:
        return None
    return _parsed(words) if words else None


def start_processes() -> None:
    """Replaces this process by torchrun's agent with the processes that `accelerate launch` was asked for; nothing where none is missing.

    Raises:
        ValueError: they cannot be started here: several machines, or a GPU.
    """
    missing = asked()
    if missing is None:
        return
    if missing.machines > 1 or (os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" and _has_accelerator()):
        raise ValueError(refusal(missing))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", *_torchrun(missing)])


def refusal(missing: Asked) -> str:
    """What to do where the missing processes are not started."""
    said = f"`accelerate launch` was asked for {missing.processes} processes and started one"
    if missing.machines > 1:
        return f"{said}, as it does on CPUs: on several machines start them by torchrun (docs/how-to/several_machines.md)."
    return f"{said}: start them by `{shlex.join(['torchrun', *_torchrun(missing)[1:]])}`, or ask for --num_processes 1."


def _torchrun(missing: Asked) -> list[str]:
    program = sys.orig_argv[1:]
    while program and program[0].startswith("-") and program[0] != "-m":  # options of the interpreter itself, such as -u
        del program[0]
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(missing.processes), *program]


def _after_launch(words: list[str]) -> list[str]:
    """The words after `accelerate launch` in a process's command line; empty for another process."""
    for place, word in enumerate(words[:6]):
        name, following = PurePath(word).name, words[place + 1 :]
        if name in ("accelerate", "accelerate.exe") and following[:1] == ["launch"]:
            return following[1:]
        if name in ("accelerate-launch", "accelerate-launch.exe") or word == "accelerate.commands.launch":
            return following
        if word == "accelerate.commands.accelerate_cli" and following[:1] == ["launch"]:
            return following[1:]
    return []


def _parsed(words: list[str]) -> Asked | None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(words)
    processes, machines = given.num_processes, given.num_machines
    if processes is None or machines is None:
        try:
            defaults = load_config_from_file(given.config_file)
        except OSError:
            defaults = None
        processes = processes or getattr(defaults, "num_processes", None)
        machines = machines or getattr(defaults, "num_machines", None)
    found = Asked(processes or 1, machines or 1)
    return found if found.processes > 1 or found.machines > 1 else None


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
