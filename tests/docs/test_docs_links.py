"""Relative links and anchors of README.md and docs/ lead somewhere, every image is there, and every page is in docs/index.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_pages import DOCS, PAGES, ROOT, name_of

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
