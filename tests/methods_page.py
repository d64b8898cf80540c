"""The table of docs/methods.md, made from the registry: ``python tests/methods_page.py`` writes it anew."""

from __future__ import annotations

import inspect
from pathlib import Path

from zotune import methods
from zotune.calibration import measurable

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- the registry's table -->", "<!-- end of the registry's table -->"


def table() -> str:
    """A row for each method: name, what it is, forwards a step, memory beyond the weights, whether its rate is measured, reference."""
    rows = ["| `--method` | what it is | forwards a step | extra memory | rate | reference |", "|---|---|---|---|---|---|"]
    for name in methods.names():
        method = methods.get(name)
        first = (inspect.getdoc(methods.recipe(name)) or "").splitlines()[0]
        what = first.partition(": ")[2].rpartition(" (")[0] or first.rpartition(" (")[0]
        what = what.replace("``", "`")
        rate = "measured" if measurable(method) else f"{method.lr:g}"
        reference = f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
        rows.append(f"| `{name}` | {what} | {method.forwards_text} | {method.extra_memory} | {rate} | {reference} |")
    return "\n".join(rows)


def split() -> tuple[str, str, str]:
    """(before, table, after) of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found.strip(), after


if __name__ == "__main__":
    head, _, tail = split()
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}")
