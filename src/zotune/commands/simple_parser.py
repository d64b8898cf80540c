"""argparse for the commands with a handful of options: errors as `ValueError`, with the nearest option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from zotune.tasks.template import did_you_mean


class SimpleParser(argparse.ArgumentParser):
    """Strict `argparse.ArgumentParser`: no abbreviations, and what is wrong is one sentence."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command, description=description, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options of `argv`.

        Raises:
            ValueError: an unknown or malformed option.
        """
        for word in argv:
            flag = word.split("=", 1)[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                raise ValueError(f"unknown option {flag!r}{did_you_mean(flag, self._option_string_actions)} (see `{self.prog} --help`).")
        return self.parse_args(list(argv))

    def error(self, message: str) -> NoReturn:
        """argparse's errors, as the ValueError that the command line prints as one sentence."""
        raise ValueError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`).")
