"""The notebooks of docs/tutorial run from top to bottom, with few steps, in a kernel of their own; and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_pages import DOCS, ROOT, name_of

nbformat = pytest.importorskip("nbformat", reason="needs zotune[notebooks]")
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
#: What the test sets the notebooks' numbers to.
FEW = {"STEPS": 1, "BATCH": 2, "TESTED": 8, "TOKENS": 3}
REPOSITORY = "https://github.com/zotune/zotune/blob/main/"


@pytest.mark.slow
def test_the_notebooks_run_from_top_to_bottom(tmp_path: Path) -> None:
    """One after the other in one kernel, whose names are deleted between them."""
    nbclient = pytest.importorskip("nbclient")
    whole = nbformat.v4.new_notebook()
    for page in NOTEBOOKS:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *nbformat.read(page, as_version=4).cells]
    for number, cell in enumerate(whole.cells):
        cell.id = str(number)
        cell.source = re.sub(r"^([A-Z]+) = \d+$", lambda match: f"{match[1]} = {FEW[match[1]]}", cell.source, flags=re.MULTILINE)
    client = nbclient.NotebookClient(
        whole, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}, skip_cells_with_tag="skip-execution"
    )
    client.execute()
    said = "".join(output.get("text", "") for cell in whole.cells for output in cell.get("outputs", []))
    for name in ("accuracy", "errors", "reward"):
        assert re.search(rf"^{name} [01]\.\d+ before, [01]\.\d+ after", said, re.MULTILINE), f"{name}: {said[-500:]}"


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name_of)
def test_a_notebook_opens_in_colab_and_keeps_no_output(page: Path) -> None:
    cells = nbformat.read(page, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert f"colab.research.google.com/github/zotune/zotune/blob/main/{name_of(page)})" in text
    links = re.findall(r"\]\(([^)#]+)", text)
    assert not [link for link in links if "://" not in link], "a relative link leads nowhere in Colab"
    for link in links:
        assert not link.startswith(REPOSITORY) or (ROOT / link.removeprefix(REPOSITORY)).is_file(), link
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert any(re.match(r"STEPS = \d+$", line) for cell in cells for line in cell.source.splitlines())


def test_there_are_two_notebooks() -> None:
    assert len(NOTEBOOKS) == 2
