"""What a release says of itself: one version, one address, types, a size that an index takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import zotune
from docs_pages import ROOT
from zotune.optim.journal_records import FORMAT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = Path(zotune.__file__).parent
ADDRESSES = r"(?:github\.com|githubusercontent\.com|colab\.research\.google\.com/github)/([\w-]+/zotune)\b"
ADDRESS = PROJECT["project"]["urls"]["Repository"]


def test_the_version_is_the_same_everywhere():
    (latest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert zotune.__version__ == latest == citation["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/zotune/io/version.py"


def test_each_release_has_a_format_of_its_journals():
    text = (ROOT / "docs/reference/file_formats.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+\.\d+) \| (\d+) \|$", text, re.MULTILINE))
    assert rows[zotune.__version__.rpartition(".")[0]] == str(FORMAT)


def test_the_address_of_the_repository_is_the_same_everywhere():
    pages = [ROOT / name for name in ("mkdocs.yml", "pyproject.toml", "CITATION.cff")]
    for page in [*pages, *(ROOT / "docs/tutorial").glob("*.ipynb")]:
        named = set(re.findall(ADDRESSES, page.read_text(encoding="utf-8")))
        assert named == {ADDRESS.removeprefix("https://github.com/")}, page.name


def test_the_package_is_typed_and_fits_an_index():
    files = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert (PACKAGE / "py.typed") in files
    assert sum(file.stat().st_size for file in files) < 20e6  # before it is compressed


def test_what_the_source_distribution_names_exists():
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name
