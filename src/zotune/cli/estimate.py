"""`zotune estimate`: the peak memory of training, predicted without reading a weight."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from zotune.cli.parser import CommandParser
from zotune.cli.table import wide_table
from zotune.cli.workload import add_options, methods_of, workload
from zotune.io.json_files import write_json
from zotune.io.sizes import parse_size, size_text

#: What stands in the table when no method is asked for.
METHODS = ("zero-shot", "mezo", "lozo", "mezo-adam", "fo-sgd", "fo-adamw")


def main(argv: Sequence[str]) -> int:
    """Runs `zotune estimate`."""
    parser = CommandParser("zotune estimate", "Predicts the peak memory of training, and what it is for, without reading a weight.")
    add_options(parser)
    add = parser.add_argument
    add("--method", nargs="+", default=list(METHODS), metavar="NAME", help=f"methods to compare (default {' '.join(METHODS)})")
    add("--device", choices=("cpu", "cuda"), default="cuda", metavar="NAME", help="allocate as on a cpu or as on a GPU (cuda, the default)")
    add("--memory", metavar="SIZE", help="a card's, such as 24GB: also find the largest batch and sequence that fit it")
    add("--exact", action="store_true", help="rehearse every layer, instead of a few whose memory is continued to all")
    add("--chart", metavar="FILE", help="draw the table as a bar chart (PNG)")
    add("--json", metavar="FILE", help="write the table as JSON")
    args = parser.parse(argv)
    from zotune.memory.estimate import estimate
    from zotune.memory.formulas import FORMULAS, closed_form
    from zotune.memory.shapes import context_of
    from zotune.memory.workload import elements_of, trains

    limit = parse_size(args.memory) if args.memory else None
    dtype = args.dtype or "bfloat16"
    accelerator = args.device == "cuda"
    begin = time.perf_counter()
    plans = [workload(args, method, dtype) for method in methods_of(args.method, args.method_args)]
    parameters, largest_parameter = elements_of(plans[0])
    rows: list[dict[str, Any]] = []
    for plan in plans:
        split = estimate(plan, accelerator=accelerator, exact=args.exact)
        name = plan.method.name
        saved = split.kinds["activations"] if name.startswith("fo-") else 0
        formula = closed_form(name, parameters, largest_parameter, saved, half=dtype != "float32") if args.scheme == "full" else None
        row = {"method": name, "total": split.total, **split.kinds, "formula": formula}
        if limit is not None:
            row |= _fits(plan, limit, accelerator, context_of(plan.config) or 1 << 20)
        rows.append(row)
        row["split"] = split
    shown = ["method", "peak", *(k for k in rows[0]["split"].kinds), "ZO-Bench formula"] + (["batch", "sequence"] if limit else [])
    table = []
    for row in rows:
        cells = [row["method"], size_text(row["total"]), *(size_text(row[kind]) for kind in row["split"].kinds)]
        cells.append(size_text(row["formula"]) if row["formula"] else "–")
        table.append(cells + ([str(row["batch"]), str(row["sequence"])] if limit else []))
    print(
        f"{args.model_name_or_path}: {parameters / 1e6:,.0f} million parameters, {dtype}, {args.scheme}, batch {args.batch_size}, "
        f"{args.sequence_length} tokens, allocated as on a {'GPU' if accelerator else 'CPU'}"
    )
    print(wide_table(shown, table))
    if limit is not None:
        print(f"batch, sequence: the largest that fit {size_text(limit)}, the other as above (0: not even 1).")
    if any(row["formula"] for row in rows):
        used = [f"{row['method']} {FORMULAS[row['method']]}" for row in rows if row["formula"]]
        print(f"ZO-Bench (2402.11592): {'; '.join(used)}.")
    print(f"Tensors alone: add the library's own ({'about 0.5 GB for CUDA' if accelerator else 'about 0.5 GB for Python and torch'}).")
    print(f"({time.perf_counter() - begin:.0f} s; no weight was read)")
    if args.chart:
        from zotune.memory.charts import bar_chart

        title = f"{args.model_name_or_path}, {dtype}, batch {args.batch_size} × {args.sequence_length} tokens"
        bar_chart({row["method"]: row["split"] for row in rows}, args.chart, title, limit)
        print(f"chart: {args.chart}")
    if args.json:
        clean = [{key: value for key, value in row.items() if key != "split"} for row in rows]
        write_json(args.json, clean)
    assert all(trains(plan.method) or plan.method.build is None for plan in plans)
    return 0


def _fits(plan: Any, limit: int, accelerator: bool, context: int) -> dict[str, int]:
    """The largest batch and the largest sequence that fit ``limit`` bytes."""
    from zotune.memory import search
    from zotune.memory.estimate import estimate

    def needs(**changes: Any) -> int:
        return estimate(plan.with_(**changes), accelerator=accelerator).total

    step = 1 if context <= 64 else 16
    batch = search.largest(lambda n: needs(batch_size=n), limit, 1 << 14)
    blocks = search.largest(lambda n: needs(sequence_length=max(2, n * step)), limit, math.floor(context / step))
    return {"batch": batch, "sequence": blocks * step}
