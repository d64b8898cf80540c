"""`zotune memory`: the memory of one method's step, predicted, and with --measure that of a real one beside it."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.cli.parser import CommandParser
from zotune.cli.table import wide_table
from zotune.cli.workload import add_options, methods_of, workload
from zotune.io.json_files import write_json
from zotune.io.sizes import size_text


def _parser() -> CommandParser:
    parser = CommandParser("zotune memory", "The memory of a training step by what it is for: predicted, and measured on real tensors.")
    add_options(parser)
    add = parser.add_argument
    add("--method", required=True, metavar="NAME", help="one of `zotune methods`")
    add("--measure", action="store_true", help="run real steps (random weights of the model's shapes) and stand their memory beside it")
    add("--json", metavar="FILE", help="write the figures as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs `zotune memory`."""
    args = _parser().parse(argv)
    import torch

    from zotune.memory.estimate import estimate, measure
    from zotune.memory.process import process_peak
    from zotune.training.peak_memory import PeakMemory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (method,) = methods_of([args.method], args.method_args)
    plan = workload(args, method, args.dtype or "float32")
    predicted = estimate(plan, accelerator=device.type == "cuda", exact=True)
    columns = {"predicted": predicted.kinds}
    totals: dict[str, int] = {"predicted": predicted.total}
    if args.measure:
        counted = measure(plan, device)
        columns["measured"] = counted.kinds
        totals["measured"] = counted.total
        if device.type == "cuda":
            torch.cuda.empty_cache()
            memory = PeakMemory(device)
            measure(plan, device, ledger=False)
            totals["CUDA allocator"] = memory.peak() - memory.baseline
        else:
            totals["process"] = process_peak(plan)
    rows = [(kind, *(size_text(column[kind]) for column in columns.values())) for kind in predicted.kinds]
    rows.append(("sum", *(size_text(totals[name]) for name in columns)))
    print(wide_table(("at the peak", *columns), rows))
    for name in ("process", "CUDA allocator"):
        if name in totals:
            what = "the process grew by" if name == "process" else "the CUDA allocator's peak"
            print(f"{what} {size_text(totals[name])}: predicted / measured = {predicted.total / totals[name]:.3f}")
    if args.measure and device.type != "cuda":
        print("No CUDA device here: measured on the CPU, by the tensors' ledger and the resident set of a process of its own.")
    if args.json:
        write_json(args.json, {"totals": totals, **columns})
    return 0
