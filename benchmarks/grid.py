"""Every method under every scheme through `zotune train`, a few steps each: does it run, or why is it refused.

    python benchmarks/grid.py --model M --task sst2 --data_dir D --out docs/explanation/results/methods_grid.md

A cell is a run of the command as it stands, with the method's defaults and a measured rate where that is possible: loss at the first and
the last step, and seconds per step. It does not show that a method learns, which takes more steps and a search for rates (see
docs/explanation/results/learning.md), nor its memory (``zotune methods``, docs/explanation/memory.md). Cells are kept in ``--results``
and not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

from zotune.baselines import catalog
from zotune.cli.main import main as zotune

SCHEMES = ["full", "lora", "prefix", "prompt", "head"]


def cell(args: argparse.Namespace, method: str, scheme: str, folder: Path) -> tuple[str, str | None]:
    """The text of a cell, and why the run was refused or failed, if it was."""
    words = ["train", "--model_name_or_path", str(args.model), "--task", args.task, "--data_dir", str(args.data_dir), "--method", method]
    words += ["--scheme", scheme, "--max_steps", str(args.steps), "--logging_steps", "1", "--save_strategy", "no", "--seed", "0"]
    words += ["--num_train", "64", "--num_eval", "16", "--per_device_train_batch_size", "8", "--output_dir", str(folder), "--use_cpu"]
    words += ["--truncate"] if method == "icl" else []  # demonstrations and all are more than a small model's context
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = zotune(words)
        except Exception as error:
            code = -1
            print(f"zotune: {type(error).__name__}: {error}", file=said)
    if code:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("zotune: ")]
        return ("refused" if code == 2 else f"FAILED ({code})"), (lines or ["no reason given"])[-1].removeprefix("zotune: ")
    found = json.loads((folder / "summary.json").read_text())
    if not found["steps"]:
        return f"{found['metric']} {found['after'][found['metric']]:.2f}", None
    loss = found["loss"]
    return f"{loss['first']:.2f} → {loss['last']:.2f}, {found['training_seconds'] / found['steps']:.2f} s", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=catalog.names())
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/methods_grid.jsonl"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    known = {(cell["method"], cell["scheme"]): (cell["text"], cell["why"]) for cell in map(json.loads, lines)}
    reasons: dict[str, int] = {}
    rows = [f"| method | {' | '.join(args.schemes)} |", "|---|" + "---|" * len(args.schemes)]
    ran = failed = 0
    with tempfile.TemporaryDirectory() as place:
        for method in args.methods:
            texts = []
            for scheme in args.schemes:
                folder = Path(place) / "run"
                if (method, scheme) not in known:
                    text, why = known[method, scheme] = cell(args, method, scheme, folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    with args.results.open("a") as results:
                        results.write(json.dumps({"method": method, "scheme": scheme, "text": text, "why": why}) + "\n")
                text, why = known[method, scheme]
                if why is not None:
                    why = why.replace(f"--scheme {scheme}", "--scheme S").replace(method, "M")
                    text += f" [{reasons.setdefault(why, len(reasons) + 1)}]"
                ran, failed = ran + (why is None), failed + text.startswith("FAILED")
                texts.append(text)
            rows.append(f"| {method} | {' | '.join(texts)} |")
            print(rows[-1], flush=True)
    cells = len(args.methods) * len(args.schemes)
    page = [
        "# Every method under every scheme",
        "",
        f"`zotune train` for {args.steps} steps of 8 examples of {args.task} with a small language model and every method's defaults:",
        "training loss at the first and the last step, and seconds per step, measurements included, on a busy machine.",
        "It shows that they run, not that they learn.",
        f"{ran} of {cells} cells ran, {cells - ran - failed} are refused for a reason, {failed} failed.",
        "",
        *rows,
        "",
        *(f"{number}. {why}" for why, number in reasons.items()),
        "",
        "```",
        f"python benchmarks/grid.py --model MODEL --task {args.task} --data_dir DATA --out docs/explanation/results/methods_grid.md",
        "```",
    ]
    args.out.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
