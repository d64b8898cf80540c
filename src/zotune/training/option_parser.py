"""Options as dataclasses, from flags and YAML: :class:`OptionParser`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from zotune.io import safe_yaml
from zotune.io.failures import LONGEST
from zotune.io.suggest import did_you_mean
from zotune.io.text import shortened, shown
from zotune.rewards.loading import is_code
from zotune.training.arguments import ACCURACY

#: Options that let code of others run: a file from elsewhere must not set them.
COMMAND_LINE_ONLY = ("trust_remote_code",)
#: The option that may be given several times.
REPEATED = "reward"


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` with YAML files, whose errors are one sentence with the nearest name.

    Args:
        dataclass_types: dataclasses whose fields are the flags.
        command: for messages and usage, such as `zotune train`.
        defaults: field name → default, in place of the dataclass's.
    """

    def __init__(self, dataclass_types: Sequence[type], command: str, defaults: Mapping[str, Any] | None = None):
        super().__init__(dataclass_types, prog=command, add_help=False, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="a YAML file of these options; flags override it")
        self.set_defaults(**dict(defaults or {}))

    def parse(
        self,
        argv: Sequence[str],
        adjust: Callable[[dict[str, Any], set[str]], None] | None = None,
        before: Callable[[dict[str, Any], set[str]], Sequence[str]] | None = None,
    ) -> tuple[tuple[Any, ...], set[str]]:
        """The dataclasses, and the names of the given options.

        Args:
            argv: the words after the command's name.
            adjust: called with the values by name and the given names, before the dataclasses are created.
            before: called with the same, for words that the given ones override.

        Raises:
            ValueError: unknown flag or key, wrong type or choice. FileNotFoundError: the YAML file does not exist.
        """
        argv = _joined(argv, REPEATED)
        config = self._config_of(argv)
        words = [*self._yaml_words(config), *argv] if config else list(argv)
        values = self.values(words)
        by_flag = self._option_string_actions
        given = {by_flag[flag].dest for word in words if (flag := word.split("=", 1)[0]) in by_flag}
        first = [] if before is None else before(values, given)
        if first:
            values = self.values([*first, *words])
        if adjust is not None:
            adjust(values, given)
        try:
            instances = tuple(
                dtype(**{f.name: values[f.name] for f in dataclasses.fields(dtype) if f.init}) for dtype in self.dataclass_types
            )
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # Hugging Face checks its fields incompletely
            raise ValueError(f"the value of an option is invalid ({' '.join(str(error).split())}).") from error
        return instances, given

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of all options by name; ValueError for an unknown or malformed one."""
        namespace, unknown = self.parse_known_args(list(words))
        for word in unknown:
            flag = word.split("=", 1)[0]
            if flag.startswith("-"):
                raise ValueError(f"unknown option {flag!r}{did_you_mean(flag, self._flags())} (see `{self.prog} --help`).")
            raise ValueError(f"{word!r} does not belong to an option (see `{self.prog} --help`).")
        return vars(namespace)

    def options(self) -> dict[str, argparse.Action]:
        """The options by field name."""
        return {action.dest: action for action in self._actions}

    def _config_of(self, argv: Sequence[str]) -> str | None:
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            return finder.parse_known_args(list(argv))[0].config
        except argparse.ArgumentError as error:
            raise ValueError("--config needs the name of a YAML file.") from error

    def _yaml_words(self, path: str) -> list[str]:
        """The options of a flat YAML file as command-line words, each checked here so that errors name the file."""
        content = safe_yaml.read(Path(path).expanduser(), path)
        if content is None:
            return []
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected `option: value` lines, found a {type(content).__name__}.")
        actions = {name: action for name, action in self.options().items() if name != "config"}
        words: list[str] = []
        for key, value in content.items():
            name = str(key).replace("-", "_")
            name = getattr(self._option_string_actions.get(f"--{name}"), "dest", name)  # of an alias
            if name not in actions:
                raise ValueError(f"{path}: unknown key {shown(key)}{did_you_mean(name, actions)}.")
            if value is None:
                continue
            if name in COMMAND_LINE_ONLY and value is not False:
                raise ValueError(f"{path}: {name} can be set on the command line only (--{name}), not by a file: leave it out.")
            if name == "reward":
                check_not_code(path, value if isinstance(value, list) else [value])
            if isinstance(value, dict) and actions[name].nargs == "+":
                value = [f"{each}={'' if of is None else of}" for each, of in value.items()]
            try:
                if isinstance(value, list):
                    _check_list(name, value, is_list=actions[name].nargs == "+")
                piece = option_words(name, value)
                self.parse_known_args(piece)
            except ValueError as error:
                raise ValueError(shortened(f"{path}: {error}", LONGEST)) from error
            words += piece
        return words

    def _flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if "_" in flag or "-" not in flag[2:]]

    def error(self, message: str) -> Any:
        """Raises argparse's errors as ValueError."""
        # "argument --max_steps/--max-steps: invalid int value: 'x'" names one spelling of the flag only
        raise ValueError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            flag = action.option_strings[0]
            raise ValueError(f"{flag}: unknown value {str(value)!r}{did_you_mean(value, choices)} (one of {', '.join(choices)}).")


def option_words(name: str, value: Any) -> list[str]:
    """The command-line words of an option: ``["--rank=1"]``, ``["--truncate=true"]``."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    return [f"--{name}={value}"]


def _joined(argv: Sequence[str], name: str) -> list[str]:
    """The words with all values of an option, which may be given several times, behind one flag at the end."""
    words: list[str] = []
    values: list[str] = []
    flag, inside = f"--{name}", False
    for word in argv:
        if word == flag or word.startswith(f"{flag}="):
            inside = word == flag
            values += [] if inside else [word.removeprefix(f"{flag}=")]
            continue
        inside = inside and not word.startswith("--")
        (values if inside else words).append(word)
    if flag in argv and not values:
        return list(argv)  # argparse says that a value is missing
    return [*words, flag, *values] if values else words


def check_not_code(path: str | Path, rewards: Sequence[Any]) -> None:
    """ValueError where a file names a reward that runs code: the command line alone may name it."""
    for each in map(str, rewards):
        if each != ACCURACY and is_code(each):
            raise ValueError(f"{path}: the reward {shown(each)} is code, which only the command line can name (--reward), not a file.")


def _check_list(name: str, value: list[Any], *, is_list: bool) -> None:
    if not is_list:
        raise ValueError(f"{name} takes one value, not a list.")
    if any(str(item).startswith("--") for item in value):
        raise ValueError(f"{name}: an item of the list begins with --, like an option.")
