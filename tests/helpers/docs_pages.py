"""The pages of README.md and docs/, their code blocks, and the files that they show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_YAML = re.compile(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """A page's path below the repository, for messages and test names."""
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[str]:
    """The page's Python, block by block."""
    return _PYTHON.findall(page.read_text(encoding="utf-8"))


def save_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows: YAML that begins with ``# NAME.yaml``, and any block after ``<!-- file: NAME -->``."""
    text = page.read_text(encoding="utf-8")
    for name, content in [*_YAML.findall(text), *_FILE.findall(text)]:
        (folder / name).write_text(content, encoding="utf-8")
