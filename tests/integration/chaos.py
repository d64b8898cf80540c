"""Disturb small runs again and again, and compare them with the runs that nobody disturbed: `make chaos`.

A run of `zotune train`, or of `torchrun --max-restarts` around it, is killed at a random instant or at one of its file operations, is
interrupted (Ctrl-C) there, or finds the disk full from there on. Then it is started again, by the plain command or by
`--resume_from_checkpoint true`, until it ends. What counts as a failure:

- bytes that differ from the undisturbed run's: of the journal, of the weights, of the metrics after training;
- a dead end: both commands are refused;
- a traceback, an exit code that does not fit, damage that `zotune verify` finds, leftovers at the end, a file of the user's that is gone.

Every attempt forks this process, which has imported everything, and so takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.figure  # noqa: F401  what runs import late
import peft  # noqa: F401
import torch
import transformers

import zotune.cli.train  # noqa: F401
from command_cases import save_data, save_encoder, save_model
from disturbed import Disturbance, Ended, torchrun, train
from zotune import bundled
from zotune.cli.verify import findings
from zotune.engines.gguf.convert import convert
from zotune.training import run_folder
from zotune.training.checkpoint import storage
from zotune.training.run_folder import Kind, kind_of

WORDS = (
    "--task sst2 --data_dir data --num_train 16 --num_eval 4 --max_steps 8 --learning_rate 1e-3 "
    "--eval_strategy no --logging_steps 1000 --per_device_train_batch_size 4 --use_cpu true"
)
SAVING = "--save_steps 3 --save_total_limit 2"
DECODER, ENCODER = "--model_name_or_path my-model", "--model_name_or_path my-encoder"
GGUF = "--model_name_or_path my-model.gguf --n_threads 1"
REWARDED = f"{DECODER} --reward characters:9 --max_completion_length 4 --interval 3"
ZO, ZO_ENCODER = (f"{model} --forward_batching batched" for model in (DECODER, ENCODER))
SAVED_BEFORE_RUN = "--method mezo --max_steps 2 --save_strategy no --seed 5"


@dataclass(frozen=True)
class Setup:
    """A run: further words of `zotune train`; the processes of torchrun (0: the command alone); whether it replaces another run."""

    words: str
    processes: int = 0
    over: bool = False


METHODS = ("lozo-g", "lozo", "lozo-m", "lozo-e", "mezo", "mezo-adam", "mezo-svrg", "hizoo", "hizoo-l", "agzo", "meazo", "fzoo")
METHODS += ("replayed-adam", "sparse-mezo", "zo-block", "zo-sgd-cons", "zo-rmsprop", "jaguar-muon")
SETUPS: dict[str, Setup] = {
    **{name: Setup(f"{ZO} --method {name}") for name in METHODS},
    **{name: Setup(f"{ZO} --method {name} --rank 2") for name in ("subzero", "tezo", "zo-muon")},
    "sensitive-mezo": Setup(f"{DECODER} --method sensitive-mezo --forward_batching sequential"),
    "lora": Setup(f"{ZO} --method lozo-m --scheme lora"),
    "prefix": Setup(f"{ZO} --method mezo --scheme prefix"),
    "int8": Setup(f"{ZO} --method lozo-m --quantize int8"),
    "lora on int8": Setup(f"{ZO} --method mezo-adam --scheme lora --quantize int8"),
    "scales": Setup(f"{ZO} --method mezo --scheme scales --quantize int8"),
    "offload": Setup(f"{ZO} --method lozo-m --offload disk"),
    "accumulation": Setup(f"{ZO} --method lozo-e --gradient_accumulation_steps 2"),
    "measured rate": Setup(f"{ZO} --method lozo-e --learning_rate auto"),
    "best model": Setup(f"{ZO} --method lozo-m --eval_strategy steps --eval_steps 3 --load_best_model_at_end true --num_dev 4"),
    "one checkpoint": Setup(f"{ZO} --method mezo-adam --save_steps 2 --save_total_limit 1"),
    "journal alone": Setup(f"{ZO} --method lozo-m --save_strategy no"),
    "encoder": Setup(f"{ZO_ENCODER} --method lozo-m"),
    "fo-adamw": Setup(f"{DECODER} --method fo-adamw"),
    "fo-sgd, no checkpoint": Setup(f"{DECODER} --method fo-sgd --save_strategy no"),
    "fo-adamw, a fresh head": Setup(f"{ENCODER} --method fo-adamw --scheme head"),
    "hybrid": Setup(f"{DECODER} --method hybrid"),
    "galore": Setup(f"{DECODER} --method galore"),
    "rewards, sampled": Setup(f"{REWARDED} --method lozo --num_directions 2 --temperature 1 --num_generations 2 --learning_rate auto"),
    "rewards, anchored": Setup(f"{REWARDED} --method lozo-e --anchor_decay 0.1 --learning_rate auto --eps auto"),
    "gguf, lozo-g": Setup(f"{GGUF} --method lozo-g --interval 3"),
    "gguf, lozo-m": Setup(f"{GGUF} --method lozo-m --interval 3"),
    "zero-shot": Setup(f"{DECODER} --method zero-shot --max_steps 1"),
    "linear probe": Setup(f"{DECODER} --method linear-probe --max_steps 1"),
    "over another run": Setup(f"{ZO} --method lozo-m", over=True),
    "torchrun": Setup(f"{ZO} --method lozo-m", processes=1),
    "torchrun, fo-adamw": Setup(f"{DECODER} --method fo-adamw", processes=1),
    "torchrun, over another run": Setup(f"{ZO} --method lozo-m", processes=1, over=True),
    "torchrun, two processes, rewards": Setup(f"{REWARDED} --method lozo --temperature 1 --num_directions 2", processes=2),
    "torchrun, two processes": Setup(f"{ZO} --method lozo-e --per_device_train_batch_size 2", processes=2),
}
#: Set-ups whose start is disturbed at every file operation.
STARTS = ("lozo-m", "lora", "fo-adamw, a fresh head", "over another run", "linear probe")
OPERATIONS = 30  # of a start, and a few more
KINDS = ("kill", "interrupt", "full", "refused")
MINE = {"notes.txt": "mine", "checkpoint-notes/a.txt": "mine", "checkpoint-500.txt": "mine", ".mine.partial": "mine"}


class Failure(AssertionError):
    """A run that was lost, changed or stuck."""


@dataclass
class Chaos:
    """Disturbed runs in a working folder with `my-model`, `my-encoder` and `data`."""

    place: Path
    seed: int
    names: list[str]
    say: Callable[[str], None] = print
    rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    straight: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def expected(self, name: str) -> tuple[dict[str, str], float]:
        """The digests of an undisturbed run and its seconds."""
        if name not in self.straight:
            setup, folder = SETUPS[name], self.place / "straight" / name.replace(" ", "-").replace(",", "")
            begin = time.monotonic()
            words = self.words(setup, folder)
            done = torchrun(words, folder, [], setup.processes) if setup.processes else train(words, folder, Disturbance())
            if done.code != 0:
                raise Failure(f"{name}: the undisturbed run failed: {done.error}")
            self.straight[name] = digests(folder), time.monotonic() - begin
        return self.straight[name]

    def words(self, setup: Setup, folder: Path) -> list[str]:
        saving = "" if "--save_strategy" in setup.words else SAVING
        return [*WORDS.split(), *saving.split(), *setup.words.split(), "--output_dir", str(folder)]

    def run(self, name: str, first: Disturbance | None, most: int) -> None:
        """One run, disturbed at first as given and then at random, at most so often; Failure where it does not end as it should."""
        setup = SETUPS[name]
        expected, seconds = self.expected(name)
        folder = self.place / "run"
        shutil.rmtree(folder, ignore_errors=True)
        if setup.over:
            shutil.copytree(self.other(), folder)
        for path, text in MINE.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        history: list[str] = []
        try:
            if setup.processes:
                self.launch(setup, folder, first, most, history)
            else:
                self.attempts(setup, folder, first, most, seconds, history)
            self.check_end(folder, expected)
        except Failure as error:
            raise Failure(f"{name} (seed {self.seed}): {error}; attempts: {'; '.join(history)}; the folder is {folder}") from None

    def attempts(self, setup: Setup, folder: Path, first: Disturbance | None, most: int, seconds: float, history: list[str]) -> None:
        words = self.words(setup, folder)
        while True:
            disturbance = first or (self.disturbance(seconds) if len(history) < most else Disturbance())
            first = None
            own = not setup.over or kind_of(folder) is Kind.BEGUN or method_of(folder) not in (None, "mezo")
            ways = [[], ["--resume_from_checkpoint", "true"]] if own else [["--overwrite_output_dir"]]
            self.draw.shuffle(ways)
            for way in ways:
                done = train([*words, *way], folder, disturbance)
                history.append(f"{' '.join(way) or 'plain'}, {disturbance.kind} {disturbance.at:g}: {done.code}")
                if not done.refused:
                    break
            else:
                raise Failure(f"a dead end: {done.error}")
            self.check_attempt(folder, disturbance, done)
            if done.code == 0:
                return
            self.count(disturbance)
            if kind_of(folder) is Kind.ENDED and not setup.over:  # killed after its last file was written
                return

    def launch(self, setup: Setup, folder: Path, first: Disturbance | None, most: int, history: list[str]) -> None:
        disturbances = [first or self.disturbance(None), *(self.disturbance(None) for _ in range(most - 1))]
        words = [*self.words(setup, folder), *(["--overwrite_output_dir"] if setup.over else [])]
        done = torchrun(words, folder, disturbances, setup.processes)
        history += [f"{each.kind} {each.at:g}" for each in disturbances]
        for disturbance in disturbances:
            self.count(disturbance)
        if done.code != 0 or "\nTraceback" in done.error:  # the agent logs its own, in lines that begin with a date
            raise Failure(f"exit code {done.code}: {done.error}")

    def refused_launch(self) -> None:
        """A folder of another run: torchrun's restarts must not touch it."""
        folder = self.place / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.other(), folder)
        (folder / "checkpoint-notes").mkdir()
        (folder / "checkpoint-notes/a.txt").write_text("mine")
        before = everything(folder)
        done = torchrun(self.words(SETUPS["torchrun"], folder), folder, [Disturbance(), Disturbance()], 1)
        if done.code != 2 or everything(folder) != before or "already holds a run" not in done.error:
            raise Failure(f"torchrun went on in a folder that it was refused ({done.code}): {done.error}")
        self.count(Disturbance("a refused launch"))

    def other(self) -> Path:
        """A finished run of another method."""
        folder = self.place / "other"
        if not folder.exists():
            done = train([*WORDS.split(), *DECODER.split(), *SAVED_BEFORE_RUN.split(), "--output_dir", str(folder)], folder, Disturbance())
            assert done.code == 0, done.error
        return folder

    def disturbance(self, seconds: float | None) -> Disturbance:
        kind = self.draw.choice(KINDS + ("fold",) + (("time",) * 3 if seconds is not None else ()))
        if kind == "time":
            return Disturbance(kind, self.draw.uniform(0.02, 0.9 * (seconds or 0)))
        return Disturbance(kind, 1 + int(self.draw.random() ** 1.5 * (16 if kind == "fold" else 150)))

    def count(self, disturbance: Disturbance) -> None:
        self.rounds += 1
        self.counts[disturbance.kind] += 1

    def check_attempt(self, folder: Path, disturbance: Disturbance, done: Ended) -> None:
        fits = {"kill": (None, 0), "fold": (None, 0), "time": (None, 0), "interrupt": (130, 0), "none": (0,)}
        if done.code not in fits.get(disturbance.kind, (2, 0)) or "Traceback" in done.error:
            raise Failure(f"exit code {done.code}: {done.error}")
        if done.code == 2 and "free some space" not in done.error:
            raise Failure(f"a full disk is not named: {done.error}")
        if folder.is_dir() and kind_of(folder) is not Kind.UNUSED:
            faults = findings(folder)[1]
            if faults:
                raise Failure(f"`zotune verify` finds damage: {faults}")

    def check_end(self, folder: Path, expected: dict[str, str]) -> None:
        found = digests(folder)
        different = [name for name in expected if found.get(name) != expected[name]]
        if different:
            raise Failure(f"it ended otherwise than the undisturbed run, in {', '.join(different)}")
        if storage.leftovers(folder):
            raise Failure(f"leftovers at the end: {storage.leftovers(folder)}")
        if findings(folder)[1]:
            raise Failure(f"`zotune verify` finds damage at the end: {findings(folder)[1]}")
        for path, text in MINE.items():
            if not (folder / path).is_file() or (folder / path).read_text() != text:
                raise Failure(f"{path} is the user's, and is gone")

    def plan(self) -> Iterator[tuple[str, Disturbance | None]]:
        """Starts disturbed at every file operation, and between them all set-ups, for ever."""
        starts = [
            (name, Disturbance(kind, at)) for name in STARTS if name in self.names for kind in KINDS for at in range(1, OPERATIONS + 1)
        ]
        self.draw.shuffle(starts)
        while True:
            for name in self.draw.sample(self.names, len(self.names)):
                yield name, None
                yield from ([starts.pop()] if starts else [])

    def carry_out(self, rounds: int) -> int:
        """Disturbs runs until there were so many disturbances; the number of runs."""
        runs, begin = 0, time.monotonic()
        self.refused_launch()
        for name, first in self.plan():
            if self.rounds >= rounds:
                break
            most = 2 if first else self.draw.randint(2, 6)
            self.run(name, first, min(most, rounds - self.rounds))
            runs += 1
            if runs % 10 == 0:
                self.say(f"{runs} runs, {self.rounds} disturbances, {time.monotonic() - begin:.0f} s: nothing lost, no dead end")
        counted = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        self.say(f"seed {self.seed}: {self.rounds} disturbances in {runs} runs: 0 lost, 0 dead ends, 0 changed bytes ({counted})")
        self.say(f"{time.monotonic() - begin:.0f} s, {sum(os.times()[:4]):.0f} s of processor time")
        return runs


def possible(place: Path) -> list[str]:
    """Names of the set-ups for which all is installed."""
    return [name for name in SETUPS if (place / "my-model.gguf").exists() or not name.startswith("gguf")]


def method_of(folder: Path) -> str | None:
    """The method of the run in a folder."""
    try:
        return run_folder.read_run(folder)["training_arguments"]["method"]
    except (OSError, ValueError, KeyError):
        return None


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a finished run's journal and tensors, and its metrics."""
    names = [path for path in (*sorted(folder.glob("*.safetensors")), folder / "adapter.gguf", folder / "journal.zo") if path.is_file()]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    summary = json.loads((folder / run_folder.SUMMARY_FILE).read_text())
    metrics = {
        when: None
        if summary[when] is None
        else {name: value for name, value in summary[when].items() if "per_second" not in name and "runtime" not in name}
        for when in ("before", "after")
    }
    return found | {"metrics": json.dumps([metrics, summary["steps"], summary["forward_passes"], sorted(found)])}


def prepare(place: Path) -> None:
    """The working folder of the runs."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    save_model(place / "my-model")
    save_encoder(place / "my-encoder")
    with contextlib.suppress(ImportError):  # without llama.cpp
        importlib.import_module("llama_cpp.llama_cpp")
        convert(bundled.path("tiny-lm"), place / "my-model.gguf", "q8_0")
    save_data(place)
    os.chdir(place)
    gc.collect()
    gc.freeze()  # what was imported is not collected again in every fork


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb small runs at random points, and compare them with the undisturbed ones.")
    parser.add_argument("--rounds", type=int, default=200, help="how many disturbances (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SETUPS, metavar="SETUP", help="these set-ups alone")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # a kill loses nothing that a process wrote, synced or not: no need to wait for a disk
    place = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if os.access(memory, os.W_OK) else None))
    prepare(place)
    try:
        Chaos(place, options.seed, options.only or possible(place)).carry_out(options.rounds)
    except Failure as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    os.chdir("/")
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
