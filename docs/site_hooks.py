"""Hooks of the site (mkdocs.yml): what is in one place already is read from there.

The navigation is what docs/index.md links to, section by section, each page followed by the pages in the folder of its name. The pages
``reference/api/MODULE.md`` exist on the site alone: for each module of docs/reference/python_api.md the signatures and docstrings of
its names. A notebook is shown as a page of its name. Links out of docs/ lead to the repository.
"""

from __future__ import annotations

import importlib
import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
API = "reference/python_api.md"
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def navigation() -> list[Any]:
    """Sections of docs/index.md with their pages, in its order."""
    found: list[Any] = ["index.md"]
    for section in re.split(r"^## ", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        links = dict.fromkeys(path for path, _ in _LINK.findall(section) if (DOCS / path).is_file() and not path.startswith(".."))
        found.append({re.split(r"[:\n]", section)[0].strip(): [_entry(path) for path in links]})
    return found


def _entry(path: str) -> Any:
    if path.endswith(".ipynb"):
        return _notebook_page(path)
    if path == API:
        return {"Python API": [API, *({module: _api_page(module)} for module in api_names())]}
    folder = DOCS / path.removesuffix(".md")
    if not folder.is_dir():
        return path
    below = dict.fromkeys(
        link for link, _ in _LINK.findall((DOCS / path).read_text(encoding="utf-8")) if link.startswith(f"{folder.name}/")
    )
    return {folder.name.capitalize(): [path, *(posixpath.join(posixpath.dirname(path), link) for link in below)]}


def api_names() -> dict[str, list[str]]:
    """The public names of each module, as docs/reference/python_api.md lists them."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## `", (DOCS / API).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        listed = re.split(r"^### ", section, flags=re.MULTILINE)[0]  # the members of classes come with the classes
        values = re.findall(r"^Values: (.*)$", listed, re.MULTILINE)
        names = re.findall(r"^\| `(\w+)", listed, re.MULTILINE) + [name for line in values for name in re.findall(r"`(\w+)`", line)]
        found[section.partition("`")[0]] = names
    return found


def _api_page(module: str) -> str:
    return f"reference/api/{module}.md"


def _notebook_page(path: str) -> str:
    return f"{path.removesuffix('.ipynb')}.md"


def notebook(text: str, path: str, url: str) -> str:
    """The Markdown of a notebook: its texts and its code. Addresses of the repository's pages lead to those of the site."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    pages = re.compile(rf"\]\({re.escape(url)}/blob/main/docs/([^)#\s]+)")
    return pages.sub(lambda match: f"]({posixpath.relpath(match[1], posixpath.dirname(path))}", "\n\n".join(cells))


def outward(text: str, page: str, url: str) -> str:
    """The page's Markdown with links out of docs/ as addresses below ``url``."""

    def address(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[1]))
        if re.match(r"[a-z]+:", match[1]):
            return match[0]
        if target.startswith("docs/"):
            return match[0].replace(match[1], _notebook_page(match[1])) if target.endswith(".ipynb") else match[0]
        return f"]({url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}{match[2] or ''})"

    return _LINK.sub(address, text)


def on_config(config: Any) -> Any:
    """Set the navigation."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the API, and those of notebooks in their place."""
    from mkdocs.structure.files import File

    generated = api_pages()
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        generated[_notebook_page(file.src_uri)] = notebook(file.content_string, file.src_uri, config.repo_url)
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    return files


def api_pages() -> dict[str, str]:
    """The Markdown of each module's page: for each name a directive of mkdocstrings, or a link to the page that has it."""
    names = api_names()
    items = {(module, name): getattr(importlib.import_module(module), name) for module in names for name in names[module]}
    home: dict[str, tuple[str, str]] = {}  # where a definition is shown: the page of its module, else the first with a name of it
    for (module, name), item in items.items():
        if module == getattr(item, "__module__", ""):
            home[_definition(item)] = module, name
        else:
            home.setdefault(_definition(item), (module, name))
    pages = {}
    for module in names:
        lines = [f"# `{module}`", ""]
        for name in names[module]:
            item = items[module, name]
            definition = _definition(item)
            if not (inspect.isclass(item) or inspect.isroutine(item)):
                lines += [f"## `{name}`", "", f"A value of type `{type(item).__name__}`.", ""]
            elif home[definition] == (module, name):
                lines += [f"::: {definition}", "    options:", f"      heading: {name}", f"      toc_label: {name}", ""]
            else:
                where, known = home[definition]
                lines += [f"## `{name}`", "", f"See [`{where}.{known}`]({where}.md#{definition}).", ""]
        pages[_api_page(module)] = "\n".join(lines)
    return pages


def _definition(item: Any) -> str:
    return f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', id(item))}"


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Lead links out of docs/ to the repository, and the one-line reference of the API to the full one."""
    path = page.file.src_uri
    if path == API:
        markdown = re.sub(r"^## `(zotune[\w.]*)`$", r"## `\1`\n\n[Signatures and arguments](api/\1.md)", markdown, flags=re.MULTILINE)
    return outward(markdown, path, config.repo_url)
