"""`zotune quickstart`: the bundled small model on the bundled reviews, trained by forward passes and by Adam, offline.

Each training runs in a process of its own, so that its peak memory can be measured; model, data and evaluation are the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zotune import bundled
from zotune.cli.parser import CommandParser
from zotune.io.json_files import write_json
from zotune.io.sizes import size_text
from zotune.io.text import duration_text, metric_text
from zotune.methods import default
from zotune.training import run_folder

METHOD = default().name
BATCH, STEPS = 32, 60
# The forward-only run takes every default, nothing is tuned. Adam's rate is tuned: with a quarter of the training split held out, seeds
# 0 to 2, linear decay, STEPS steps of BATCH, the held-out loss (accuracy) is 0.585 (65.6 %) before, 0.522 (73.1 %) at 3e-5, 0.540
# (73.9 %) at 1e-4, and worse than both at 3e-4.
ADAM_LEARNING_RATE = 3e-5

RESULT_FILE = "quickstart.json"
FORWARD_ONLY, ADAM = PARTS = ("forward-only", "adam")


def main(argv: Sequence[str]) -> int:
    """Runs `zotune quickstart`."""
    parser = CommandParser(
        "zotune quickstart",
        "Fine-tunes the bundled 7-million-parameter model on the bundled reviews with forward passes only, then with Adam "
        "and backprop, and compares them. No network; a few minutes on two cores.",
    )
    parser.add_argument("--output_dir", default="zotune-quickstart", help="where the results go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="forward-only training steps (default: %(default)s)")
    parser.add_argument("--adam_steps", type=int, default=STEPS, help="Adam's training steps (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse(argv)
    for option in ("steps", "adam_steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, not {getattr(args, option)}.")
    folder = Path(args.output_dir).expanduser()
    if args.part is None:
        _compare(folder, args)
        return 0
    try:
        if args.part == FORWARD_ONLY:
            batching = "sequential"  # what is shown is the memory of one batch
            train(folder / FORWARD_ONLY, args.seed, method=METHOD, max_steps=args.steps, eval_steps=0.1, forward_batching=batching)
        else:
            rate = {"learning_rate": ADAM_LEARNING_RATE, "lr_scheduler_type": "linear"}
            train(folder / ADAM, args.seed, method="fo-adamw", max_steps=args.adam_steps, eval_steps=0.2, **rate)
    except KeyboardInterrupt:
        return 130  # the parent has received the signal too and reports it
    return 0


def _compare(folder: Path, args: argparse.Namespace) -> None:
    from zotune.cli.console import EnduringConsole

    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RESULT_FILE).is_file())):
        raise FileExistsError(f"{folder} holds something that is not an earlier quickstart; choose another --output_dir.")
    console = EnduringConsole()
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT_FILE, {"seed": args.seed, "steps": args.steps, "done": False})
    console.print(f"1/2  forward passes only ({METHOD}), {args.steps} steps", style="bold", highlight=False)
    _run_part(FORWARD_ONLY, folder, args)
    console.print(f"\n2/2  the same data by Adam with backprop, {args.adam_steps} steps", style="bold", highlight=False)
    _run_part(ADAM, folder, args)
    summaries = [json.loads((folder / part / run_folder.SUMMARY_FILE).read_text(encoding="utf-8")) for part in PARTS]
    rows = _rows(*summaries)
    write_json(
        folder / RESULT_FILE,
        {"seed": args.seed, "steps": args.steps, "done": True, "seconds": time.perf_counter() - began, "rows": rows},
    )
    console.print()
    console.print(_table(rows))
    console.print(
        "peak memory: resident set of the process (Python and its libraries are most of it); added: the peak over the process with the "
        "model loaded; time: training alone; a standard error of these accuracies is 3 points",
        style="dim",
        highlight=False,
    )
    console.print(_next_steps(folder), highlight=False, markup=False, soft_wrap=True)


def _run_part(part: str, folder: Path, args: argparse.Namespace) -> None:
    words = ["quickstart", "--part", part, "--output_dir", str(folder)]
    words += ["--seed", str(args.seed), "--steps", str(args.steps), "--adam_steps", str(args.adam_steps)]
    sys.stdout.flush()
    # Threads that wait by spinning make a small model many times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Forked from a process with the libraries imported, which computes nothing itself: the second part starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zotune.training.run", "zotune.cli.console", "matplotlib.figure", "matplotlib.backends.backend_agg"])
    process = context.Process(target=_work, args=(words, str(Path.cwd())))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # it has received the signal too
        raise KeyboardInterrupt("Interrupted; `zotune quickstart` starts over.") from None
    if process.exitcode:
        raise ChildFailedError(f"the {part} part of the quickstart failed (its own message is above).")


def _work(words: Sequence[str], here: str) -> None:
    from zotune.cli.main import main as command

    os.chdir(here)  # a forkserver process does not inherit it
    code = command(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter shutdown would wait for the libraries' threads


class ChildFailedError(RuntimeError):
    """A part of the quickstart has failed and printed the reason."""


def train(folder: Path, seed: int, **options: Any) -> dict[str, Any]:
    """What `zotune train` does, on the bundled model and reviews.

    Args:
        folder: of the run.
        seed: of the run.
        options: of :class:`zotune.ZOConfig`.

    Returns:
        The run's summary.
    """
    from zotune.cli.console import ConsoleObserver
    from zotune.training.arguments import DataArguments, ModelArguments, OutputArguments
    from zotune.training.config import ZOConfig
    from zotune.training.quiet import quiet_libraries
    from zotune.training.run import run
    from zotune.training.run_config import RunConfig

    quiet_libraries()
    config = ZOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        eval_strategy="steps",
        save_strategy="no",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    model = ModelArguments(str(bundled.path("tiny-lm")))
    reviews = {split: str(bundled.path("reviews") / f"{split}.jsonl") for split in ("train", "test")}
    data = DataArguments(task="sst2", train_file=reviews["train"], eval_file=reviews["test"], objective="choices")
    words = ["--output_dir", str(folder)]
    request = RunConfig(model, data, config, output=OutputArguments(overwrite_output_dir=True), data_name="reviews", words=words)
    return run(request, ConsoleObserver(table=False)).summary


def _rows(summary: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    before = {**_row("zero-shot", summary, "before", "evaluation"), "seconds": None, "forward_passes": None, "backward_passes": None}
    backprop = _row("backprop (Adam)", other, "after", "training")
    # The summary counts a backward pass as two forward passes.
    backprop |= {"forward_passes": other["steps"], "backward_passes": other["steps"]}
    return [before, _row(f"forward only ({summary['method']})", summary, "after", "training"), backprop]


def _row(what: str, summary: dict[str, Any], when: str, moment: str) -> dict[str, Any]:
    memory = summary["memory"]
    return {
        "what": what,
        "accuracy": summary[when]["accuracy"],
        "peak_memory": memory[moment],
        "extra_memory": memory[moment] - memory["loaded"],
        "seconds": summary["training_seconds"],
        "forward_passes": summary["forward_passes"],
        "backward_passes": 0,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "the bundled model on the bundled reviews (216 test sentences)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("accuracy", "peak\nmemory", "\nadded", "time", "forward\npasses"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        passes = "–" if row["forward_passes"] is None else str(row["forward_passes"])
        table.add_row(
            row["what"],
            metric_text("accuracy", row["accuracy"]),
            size_text(row["peak_memory"]),
            "+" + size_text(row["extra_memory"]),
            "–" if row["seconds"] is None else duration_text(row["seconds"]),
            passes + (f" + {row['backward_passes']} back" if row["backward_passes"] else ""),
        )
    return table


def _next_steps(folder: Path) -> str:
    model = folder / FORWARD_ONLY
    return f"""
The run is in {model}: the trained model, its journal, curve.png and summary.json.

What to try next:
  zotune replay {bundled.path("tiny-lm")} {model} --output_dir replayed
  zotune train --model_name_or_path facebook/opt-125m --task sst2 --output_dir runs/opt
  zotune train --model_name_or_path ./my-model --train_file my.jsonl --output_dir runs/mine
  zotune methods      zotune tasks      zotune train --help"""
