"""README.md, CONTRIBUTING.md, CHANGELOG.md and the pages of docs/, their code blocks, and the files that they show."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMANDS = re.compile(r"^(?:<!-- runs(?P<mark>[^\n]*?) -->\n)?```(?:console|bash|sh|shell)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE)
_YAML = re.compile(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """A page's path below the repository, for messages and test names."""
    return page.relative_to(ROOT).as_posix()


@functools.cache
def site_hooks() -> ModuleType:
    """docs/site_hooks.py, which makes the site's navigation and the pages of its API."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_blocks(page: Path) -> list[str]:
    """The page's Python, block by block."""
    return _PYTHON.findall(page.read_text(encoding="utf-8"))


def save_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows: YAML that begins with ``# NAME.yaml``, and any block after ``<!-- file: NAME -->``."""
    text = page.read_text(encoding="utf-8")
    for name, content in [*_YAML.findall(text), *_FILE.findall(text)]:
        (folder / name).write_text(content, encoding="utf-8")


class Block(NamedTuple):
    """Commands of a page in words; ``mark``: what its line `<!-- runs MARK -->` says, None without that line."""

    page: Path
    commands: list[list[str]]
    mark: str | None


def command_blocks(page: Path) -> list[Block]:
    """The page's commands, block by block."""
    found = []
    for match in _COMMANDS.finditer(page.read_text(encoding="utf-8")):
        lines = match["text"].replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]  # the others are output
        words = [shlex.split(line, comments=True) for line in lines]
        found.append(Block(page, [_bare(line) for line in words if line], None if match["mark"] is None else match["mark"].strip()))
    return found


def _bare(words: list[str]) -> list[str]:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]
