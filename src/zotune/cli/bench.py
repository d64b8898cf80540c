"""`zotune bench`: the runs of a grid file, and their report."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from zotune.bench import grid as grid_file
from zotune.bench.grid import Grid
from zotune.bench.plan import Cell, Place, check, words
from zotune.bench.progress import Progress
from zotune.bench.report import write
from zotune.bench.results import FINAL, Results
from zotune.bench.runner import Runner, default_threads, folder_of
from zotune.bench.selection import due, total
from zotune.cli.console import ConsoleObserver, new_console
from zotune.cli.parser import CommandParser
from zotune.training.quiet import quiet_libraries

_FAILED = 1


def main(argv: Sequence[str]) -> int:
    """Runs `zotune bench`."""
    options = _parser().parse(argv)
    for name in ("processes", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}.")
    path = Path(options.grid)
    grid = grid_file.load(path)
    if options.trust_remote_code:
        grid = dataclasses.replace(grid, options={**grid.options, "trust_remote_code": True})
    data_dir = None if options.data_dir is None else str(Path(options.data_dir).expanduser())
    quiet_libraries()
    try:
        places = check(grid, data_dir, models=not (options.dry_run or options.report))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}: {error}") from error
    results = Results(Path(options.output_dir) if options.output_dir else folder_of(path), keep_models=options.keep_models)
    if options.dry_run:
        _print_plan(grid, places, results, data_dir)
        return 0
    console = new_console()
    if not options.report:
        threads = options.threads or default_threads(options.processes)
        runner = Runner(grid, places, results, data_dir, options.processes, threads, Progress(console), ConsoleObserver)
        try:
            runner.carry_out()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Interrupted; the results so far are in {results.folder}. The same command resumes.") from None
    for written in write(grid, places, results.get, results.folder):
        console.print(f"report: {written}", highlight=False, soft_wrap=True)
    wanted = due(places, grid.seeds, grid.tune_seeds, results.get)
    missing = sum((results.get(run) or {}).get("status") not in FINAL for run in wanted)
    if missing:
        console.print(f"{missing} runs failed or are missing; the command without --report runs them (their log.txt has the reason).")
    return _FAILED if missing else 0


def _print_plan(grid: Grid, places: dict[Place, list[Cell]], results: Results, data_dir: str | None) -> None:
    for run in due(places, grid.seeds, grid.tune_seeds, results.get):
        done = (results.get(run) or {}).get("status") in FINAL
        print(f"# {run.title}{': done' if done else ''}\nzotune train {shlex.join(words(run, results.place(run), data_dir))}")
    print(f"# {total(places, grid.seeds, grid.tune_seeds)} runs in all; the others depend on the held-out scores of these.")


def _parser() -> CommandParser:
    parser = CommandParser(
        "zotune bench",
        "Runs a grid of models, tasks, schemes, methods, hyperparameters and seeds, and writes a report. The same command resumes an "
        "interrupted bench; runs that are done are not repeated.",
    )
    parser.add_argument("grid", metavar="GRID", help="a YAML file (docs/how-to/bench.md; ready ones are in benchmarks/grids)")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the runs and the report (default: runs/bench-GRID)")
    parser.add_argument("--data_dir", metavar="DIR", help="folder with <task>/<split>.jsonl[.gz]; without it, the Hugging Face hub")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default 1), distributed over the GPUs")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per run (default: the cores, divided among the processes)")
    parser.add_argument("--keep_models", action="store_true", help="keep weights and checkpoints of runs that are done")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the models; only for authors you trust"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="check the file and print the command of every run; run nothing")
    what.add_argument("--report", action="store_true", help="only write the report of the results so far")
    return parser
