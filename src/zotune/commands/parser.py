"""Flags and YAML of a command, from dataclasses: strict, with suggestions, and a help page that is ours.

`HfArgumentParser` supplies the types; what is added here is that unknown flags, unknown YAML keys, wrong types and wrong
choices are each one sentence with the nearest name, and that `--help` shows what matters first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from zotune import plain_yaml
from zotune.tasks.template import did_you_mean


class CommandParser(HfArgumentParser):
    """Parses flags (and a YAML file of the same names) into dataclasses.

    Args:
        dataclass_types: what to fill; a field is a flag `--field`.
        command: for messages and usage, such as `zotune train`.
        defaults: field name to the default that this command wants in place of the dataclass's own.
    """

    def __init__(self, dataclass_types: Sequence[type], command: str, defaults: Mapping[str, Any] | None = None):
        super().__init__(dataclass_types, prog=command, add_help=False, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="a YAML file of these options; flags override it")
        self.set_defaults(**dict(defaults or {}))

    # -- parsing -------------------------------------------------------------------------------------------------

    def parse(
        self, argv: Sequence[str], adjust: Callable[[dict[str, Any], set[str]], None] | None = None
    ) -> tuple[tuple[Any, ...], set[str]]:
        """The dataclasses, and the names that the user gave.

        Args:
            argv: the words after the command's name.
            adjust: called with the values by name and the names that were given, before the dataclasses are made.

        Raises:
            ValueError: unknown flag or key, wrong type or choice, with the nearest name.
            FileNotFoundError: the YAML file does not exist.
        """
        config = self._config_of(argv)
        words = [*self._yaml_words(config), *argv] if config else list(argv)
        namespace, unknown = self.parse_known_args(words)
        for word in unknown:
            flag = word.split("=", 1)[0]
            if flag.startswith("-"):
                raise ValueError(f"unknown option {flag!r}{did_you_mean(flag, self._flags())} (see `{self.prog} --help`).")
            raise ValueError(f"{word!r} does not belong to an option (see `{self.prog} --help`).")
        values = vars(namespace)
        by_flag = self._option_string_actions
        given = {by_flag[flag].dest for word in words if (flag := word.split("=", 1)[0]) in by_flag}
        if adjust is not None:
            adjust(values, given)
        try:
            instances = tuple(
                dtype(**{f.name: values[f.name] for f in dataclasses.fields(dtype) if f.init}) for dtype in self.dataclass_types
            )
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # Hugging Face's own fields are not checked by it all
            raise ValueError(f"a value of an option makes no sense ({' '.join(str(error).split())}).") from error
        return instances, given

    def option(self, name: str) -> argparse.Action:
        """The option of a field."""
        return self._option_string_actions[f"--{name}"]

    def _config_of(self, argv: Sequence[str]) -> str | None:
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            return finder.parse_known_args(list(argv))[0].config
        except argparse.ArgumentError as error:
            raise ValueError("--config needs the name of a YAML file.") from error

    def _yaml_words(self, path: str) -> list[str]:
        """The options of a flat YAML file as command-line words, each checked on its own so that errors name the file."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: this is not a text file.") from error
        content = plain_yaml.parse(text, path)
        if content is None:
            return []
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected `option: value` lines, found a {type(content).__name__}.")
        actions = {action.dest: action for action in self._actions if action.dest != "config"}
        words: list[str] = []
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(name, actions)}.")
            if value is None:
                continue
            try:
                piece = _words_of(f"--{name}", value, is_list=actions[name].nargs == "+")
                self.parse_known_args(piece)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            words += piece
        return words

    def _flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if "_" in flag or "-" not in flag[2:]]

    def error(self, message: str) -> Any:
        """argparse's errors, as the ValueError that the command line prints as one sentence."""
        # "argument --max_steps/--max-steps: invalid int value: 'x'": one spelling of the flag is enough
        raise ValueError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            flag = action.option_strings[0]
            raise ValueError(f"{flag}: unknown value {str(value)!r}{did_you_mean(value, choices)} (one of {', '.join(choices)}).")

    # -- help ----------------------------------------------------------------------------------------------------

    def help_page(self, usage: str, about: str, groups: Mapping[str, Mapping[str, str]], *, everything: bool = False) -> str:
        """The help text.

        Args:
            usage: the line after `usage:`.
            about: a paragraph.
            groups: title to {option name: its line}; an empty line takes the field's own help.
            everything: also list each remaining option.
        """
        actions = {action.dest: action for action in self._actions}
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


def _words_of(flag: str, value: Any, *, is_list: bool) -> list[str]:
    if isinstance(value, list):
        if not is_list:
            raise ValueError(f"{flag[2:]} takes one value, not a list.")
        if any(str(item).startswith("--") for item in value):
            raise ValueError(f"{flag[2:]}: an item of the list begins with --, like an option.")
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    return [f"{flag}={value}"]


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
