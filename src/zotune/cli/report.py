"""`zotune report`: a page on one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zotune.cli.parser import CommandParser
from zotune.io.atomic import write_text
from zotune.publishing.report import report


def main(argv: Sequence[str]) -> int:
    """Runs `zotune report`."""
    parser = CommandParser(
        "zotune report",
        "Writes one self-contained HTML page on one or several runs: results, curves over steps, sequences and seconds, memory, "
        "completions, the options that differ, and how to go on. A run that has not ended is shown up to its last checkpoint.",
    )
    parser.add_argument("runs", nargs="+", help="the runs' folders")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html)")
    args = parser.parse(argv)
    page = report([Path(run).expanduser() for run in args.runs])
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    print(f"{out}: {len(args.runs)} run{'s' if len(args.runs) > 1 else ''}")
    return 0
