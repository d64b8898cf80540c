"""The table of docs/reference/methods.md, made from the registry: ``python tests/helpers/methods_page.py`` writes it anew."""

from __future__ import annotations

import inspect

from docs_pages import DOCS
from zotune import methods
from zotune.optim.calibration.gains import measurable

PAGE = DOCS / "reference/methods.md"
BEGIN, END = "<!-- the registry's table -->", "<!-- end of the registry's table -->"


def table() -> str:
    """A row for each method: name, what it is, forward passes per step, state beyond the weights, default rate, reference."""
    rows = ["| `--method` | what it is | forward passes per step | state | rate | reference |", "|---|---|---|---|---|---|"]
    for name in methods.names():
        method = methods.get(name)
        first = (inspect.getdoc(methods.recipe(name)) or "").splitlines()[0]
        what = first.partition(": ")[2].rpartition(" (")[0] or first.rpartition(" (")[0]
        what = what.replace("``", "`")
        rate = "measured" if measurable(method) else f"{method.lr:g}"
        reference = f"[{method.arxiv}]({method.url})"
        rows.append(f"| `{name}` | {what} | {method.forwards_text} | {method.extra_memory} | {rate} | {reference} |")
    return "\n".join(rows)


def split() -> tuple[str, str, str]:
    """(before, table, after) of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found.strip(), after


if __name__ == "__main__":
    head, _, tail = split()
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")
