"""Command lines: the parser of commands with few options, and the help page of commands with many."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from zotune.io.suggest import did_you_mean

if TYPE_CHECKING:
    from zotune.training.option_parser import OptionParser


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations and with errors of one sentence."""

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
        """Turns an error of argparse into a ValueError."""
        raise ValueError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`).")


def help_page(parser: OptionParser, usage: str, about: str, groups: Mapping[str, Mapping[str, str]], *, everything: bool = False) -> str:
    """The help text.

    Args:
        parser: of the command.
        usage: the line after `usage:`.
        about: a paragraph.
        groups: title -> {option: help}; an empty text stands for the field's own help.
        everything: also list the remaining options.
    """
    actions = parser.options()
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, 118)]
    shown: set[str] = set()
    for title, options in groups.items():
        lines += ["", f"{title}:"]
        for name, text in options.items():
            shown.add(name)
            lines += _help_lines(actions[name], text or actions[name].help or "")
    if everything:
        lines += ["", "every other option (those of transformers.TrainingArguments among them):"]
        for name, action in sorted(actions.items()):
            if name not in shown:
                lines += _help_lines(action, action.help or "")
    return "\n".join(lines)


def _help_lines(action: argparse.Action, text: str) -> list[str]:
    flag = f"--{action.dest}"
    value = ""
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.nargs != "?":
        kind = getattr(action.type, "__name__", None) or "value"
        value = {"str": "TEXT", "int": "N", "float": "X", "string_to_bool": "BOOL"}.get(kind, "VALUE")
        value = action.metavar if isinstance(action.metavar, str) else value
    if len(value) > 40:
        value = "NAME"
    default = action.default
    if default not in (None, "", False, []) and default is not argparse.SUPPRESS and "(default" not in text:
        text = f"{text} (default {getattr(default, 'value', default)})"
    head = f"  {flag} {value}".rstrip()
    body = textwrap.wrap(" ".join(text.split()), 84) or [""]
    if len(head) > 32:
        return [head, *(" " * 34 + line for line in body)]
    return [f"{head:<34}{body[0]}", *(" " * 34 + line for line in body[1:])]
