"""`zotune train`: one run on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.cli.console import ConsoleObserver
from zotune.cli.parser import help_page
from zotune.cli.train_options import ABOUT, USAGE, groups
from zotune.memory.offload_needs import needs_of
from zotune.training import run_config
from zotune.training.quiet import quiet_libraries
from zotune.training.run import run


def main(argv: Sequence[str]) -> int:
    """Runs `zotune train`."""
    quiet_libraries()
    if {"-h", "--help", "--help-all"} & set(argv):
        everything = "--help-all" in argv
        print(help_page(run_config.option_parser(), USAGE, ABOUT, groups(), everything=everything))
        if not everything:
            print("\n`zotune train --help-all` lists every option, those of transformers.TrainingArguments among them.")
        return 0
    run(run_config.parse(argv), ConsoleObserver(), needs_of)
    return 0
