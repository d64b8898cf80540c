"""Relative links and anchors of README.md and docs/ lead somewhere, every image is there, and every page is in docs/index.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_pages import DOCS, PAGES, ROOT, name_of, site_hooks

_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _links(page: Path) -> list[str]:
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, blanks to hyphens, punctuation dropped."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{name_of(page)} links to {link}: there is no such heading"


def test_the_index_lists_every_page() -> None:
    index = DOCS / "index.md"
    seen, front = {index.resolve()}, [index, DOCS / "explanation/results.md"]
    for page in front:
        seen |= {(page.parent / link.partition("#")[0]).resolve() for link in _links(page) if link.partition("#")[0]}
    missing = [name_of(page) for page in PAGES[1:] if page.resolve() not in seen]
    assert not missing, f"in neither docs/index.md nor docs/explanation/results.md: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_is_too_long_or_names_a_path_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert "../shared" not in text


def test_the_site_has_every_page_once() -> None:
    def paths(entry) -> list[str]:
        if isinstance(entry, dict):
            entry = list(entry.values())
        return [entry] if isinstance(entry, str) else [path for each in entry for path in paths(each)]

    found = [path for path in paths(site_hooks().navigation()) if not path.startswith("reference/api/")]
    pages = [page.relative_to(DOCS).with_suffix(".md").as_posix() for page in DOCS.rglob("*") if page.suffix in (".md", ".ipynb")]
    assert sorted(found) == sorted(pages)


def test_links_out_of_the_pages_lead_to_the_repository() -> None:
    text = "[a](../../src/zotune) [b](../../Makefile#x) [c](../index.md) [d](https://x.y) [e](a.ipynb)"
    wanted = "[a](U/tree/main/src/zotune) [b](U/blob/main/Makefile#x) [c](../index.md) [d](https://x.y) [e](a.md)"
    assert site_hooks().outward(text, "how-to/page.md", "U") == wanted
