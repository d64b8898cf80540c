"""Kill and resume a small run again and again: `make chaos`.

A run of the trainer is killed (SIGKILL) at a random instant or at a place chosen by its seed: before, in the middle of or after a write to
the journal, at a sync or a rename of a checkpoint, in a fold. It is resumed until it ends, and then has to be, byte for byte, the run that
nobody disturbed: the journal, the weights, and the weights that the journal replays to. Each round forks this process, which has imported
everything, so that a round costs about a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import zotune
from trainer_cases import choice_rows, tiny_llama, trainer
from zotune.subspaces import LowRankCoordinate
from zotune.training.checkpoint.storage import checkpoints

PLACES = ("time", "before", "during", "after", "sync", "rename", "fold")
METHODS = ("lozo-m", "mezo-adam", "lozo-e")


def run(folder: Path, method: str, *, steps: int, resume: bool) -> None:
    """The small run in a folder, to its end; leaves `model.safetensors` there."""
    options: dict[str, Any] = {"method": method, "max_steps": steps, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 2}
    if "interval" in zotune.methods.options(method):
        options["interval"] = 4
    job = trainer(
        folder,
        forward_batching="batched",
        lr_scheduler_type="linear",
        warmup_steps=3,
        train_dataset=choice_rows(40),
        logging_steps=1000,
        **options,
    )
    job.train(resume_from_checkpoint=resume or None)
    job.save_model()


def begun(folder: Path) -> bool:
    """Whether there is something to resume."""
    return (folder / "journal.zo").exists() or bool(checkpoints(folder))


def digests(folder: Path) -> tuple[str, str]:
    """SHA-256 of a finished run's journal and weights."""
    return tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("journal.zo", "model.safetensors"))  # type: ignore


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, count: int) -> None:
    """Let this process die at the count-th passage of a place."""
    left = count

    def due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def around(owner: Any, name: str, deadly: Callable[..., Any]) -> None:
        genuine = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: deadly(genuine, *args, **kwargs))

    def before(genuine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if due():
            kill()
        return genuine(*args, **kwargs)

    def after(genuine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = genuine(*args, **kwargs)
        if due():
            kill()
        return found

    def torn(genuine: Callable[..., Any], descriptor: int, blob: bytes, end: int) -> int:
        if due():
            genuine(descriptor, blob[: len(blob) // 2], end)
            kill()
        return genuine(descriptor, blob, end)

    if place in ("before", "during", "after"):
        around(os, "pwrite", {"before": before, "during": torn, "after": after}[place])
    elif place == "sync":
        around(os, "fsync", before)
    elif place == "rename":
        around(Path, "rename", random.choice([before, after]))
    elif place == "fold":
        around(LowRankCoordinate, "fold", random.choice([before, after]))


def disturbed(folder: Path, method: str, steps: int, place: str, count: int, delay: float) -> bool:
    """One start or resumption in a process of its own, to be killed. Whether it was (else it came to the end)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            warnings.simplefilter("ignore")
            if place != "time":
                arm(place, count)
            run(folder, method, steps=steps, resume=begun(folder))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    if place == "time":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the run died of signal {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, f"a resumed run of {method} failed; its folder is {folder}"
    return False


def chaos(folder: Path, rounds: int, seed: int, *, steps: int = 60, say: Callable[[str], None] = print) -> int:
    """Kill and resume until there were so many kills; the number of runs that ended as the undisturbed one.

    Raises:
        AssertionError: a run could not be resumed, or ended otherwise.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    kills, runs, places, straight = 0, 0, Counter[str](), {}
    while kills < rounds or runs < 1:
        method = METHODS[runs % len(METHODS)]
        if method not in straight:
            undisturbed = folder / f"straight-{method}"
            start = time.monotonic()
            assert not disturbed(undisturbed, method, steps, "none", 0, 0.0)
            straight[method] = (digests(undisturbed), time.monotonic() - start)
        expected, seconds = straight[method]
        here = folder / f"run-{runs}"
        killed = True
        while killed:
            # Enough kills: let it end.
            place = draw.choice(PLACES) if kills < rounds else "none"
            count = 1 + int(draw.random() ** 2 * {"sync": 60, "rename": 4, "fold": 60}.get(place, 24))
            random.seed(draw.random())
            killed = disturbed(here, method, steps, place, count, draw.uniform(0.02, 0.7 * seconds))
            kills += killed
            places[place] += killed
        assert digests(here) == expected, f"{here} differs from the undisturbed run of {method} (seed {seed})"
        if runs < len(METHODS):
            base = tiny_llama()
            zotune.replay(base, here / "journal.zo").remove_hooks()
            rebuilt = base.state_dict()
            for name, tensor in load_file(here / "model.safetensors").items():
                assert torch.equal(tensor, rebuilt[name]), f"{here}: the journal replays to other weights"
        runs += 1
        say(f"run {runs} ({method}): byte-identical after {kills} kills so far")
    killed_at = ", ".join(f"{name} {count}" for name, count in sorted(places.items()) if count)
    say(f"seed {seed}: {kills} kills and resumptions in {runs} runs, all byte-identical in journal and weights ({killed_at})")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume a small run at random points, and compare with the unbroken one.")
    parser.add_argument("--rounds", type=int, default=200, help="how many kills (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    memory = Path("/dev/shm")  # a kill loses nothing that a process wrote, synced or not: no need to wait for a disk
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        chaos(Path(folder), options.rounds, options.seed)


if __name__ == "__main__":
    main()
