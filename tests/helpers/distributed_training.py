"""A training in one process and, by `forked.py` under the agent of torchrun, in several.

Every process writes what it was like to OUT/rank-N.json. With a further argument "dies", the last rank kills itself in the middle of the
first run, and torchrun's restart goes on from the checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, default_data_collator

import command_cases
import forked
import trainer_cases
from zotune.cli import main as cli
from zotune.optim.distributed import restarted
from zotune.optim.distributed.agreement import state_digest
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.weights.digest import digest

BATCH = 8


class Watch(TrainerCallback):
    """Notes a digest after every step, and kills the process after step ``dies``."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.dies: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests.append(state_digest(kwargs["optimizer"].optimizer.run))
        if state.global_step == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)


def uneven_rows(count: int = 13) -> list[dict[str, Any]]:
    """Examples of different lengths: predicted ones are evaluated in another order than theirs."""
    rows = trainer_cases.choice_rows(count)
    return [{**row, "prompt_ids": row["prompt_ids"][: 2 + number % 5]} for number, row in enumerate(rows)]


def collate_uneven(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["prompt_ids"]) for row in rows)
    padded = [row["prompt_ids"] + [0] * (width - len(row["prompt_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor([[1] * len(row["prompt_ids"]) + [0] * (width - len(row["prompt_ids"])) for row in rows]),
        "positions": torch.tensor([[len(row["prompt_ids"]) - 1] for row in rows]),
        "option_ids": torch.tensor([[option[0] for option in row["option_ids"]] for row in rows]),
        "answer": torch.tensor([row["answer"] for row in rows]),
    }


def choices(out: Path, workers: int, dies: int | None = None, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Six steps on answer options; in the first attempt the last rank kills itself after step ``dies``."""
    watch = Watch()
    options = {"per_device_train_batch_size": BATCH // workers, **options}
    trainer = trainer_cases.trainer(
        out / "choices",
        learning_rate="auto",
        eps="auto",
        save_strategy="steps",
        save_steps=2,
        callbacks=[watch],
        eval_dataset=uneven_rows(),
        eval_data_collator=collate_uneven,
        compute_metrics=trainer_cases.accuracy,
        per_device_eval_batch_size=3,
        **options,
    )
    if dies is not None and restarted(out / "choices"):
        dies, resume = None, True
    watch.dies = dies if int(os.environ.get("RANK", "0")) == workers - 1 else None
    trainer.train(resume_from_checkpoint=resume or None)
    predicted = trainer.predict(uneven_rows())
    return {
        "digests": watch.digests,
        "weights": digest(trainer.model),
        "losses": trainer_cases.losses(trainer),
        "predictions": predicted.predictions.tolist(),
        "accuracy": predicted.metrics["test_accuracy"],
        "wrapped": type(trainer.model_wrapped).__name__,
        "epoch": trainer.state.epoch,
    }


def labels(out: Path, workers: int) -> dict[str, Any]:
    """Six steps on the loss that the model computes of its labels; two micro-batches a step."""
    trainer = trainer_cases.trainer(
        out / "labels",
        method="mezo",
        per_device_train_batch_size=BATCH // workers,
        gradient_accumulation_steps=2,
        train_dataset=trainer_cases.labelled_rows(),
        data_collator=default_data_collator,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {"digest": digest(trainer.model), "losses": trainer_cases.losses(trainer), "weights": weights[::17].tolist()}


def default(out: Path, workers: int) -> list[list[float]]:
    """Coefficients of six steps of the command's default method, the last one on the four examples that an epoch leaves."""
    trainer = trainer_cases.trainer(
        out / "default",
        method="lozo-g",
        per_device_train_batch_size=BATCH // workers,
        learning_rate="auto",
        eps="auto",
        forward_batching="batched",
        method_args={"interval": 3, "begin": 0},
        train_dataset=uneven_rows(5 * BATCH + 4),
        data_collator=collate_uneven,
    )
    trainer.train()
    steps = [record for record in Journal.open(out / "default" / "journal.zo").records() if isinstance(record, StepRecord)]
    return [list(record.coefficients) for record in steps]


def command(out: Path, rank: int) -> tuple[int, str]:
    """Exit code and errors of a command whose seed differs between the ranks."""
    if rank == 0:
        command_cases.save_model(out / "my-model")
        command_cases.save_data(out)
    dist.barrier()
    words = ["--model_name_or_path", str(out / "my-model"), "--train_file", str(out / "my.jsonl"), "--method", "lozo", "--max_steps", "2"]
    words += ["--learning_rate", "1e-4", "--seed", str(rank), "--save_strategy", "no", "--output_dir", str(out / "command")]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["train", *words])
    return code, said.getvalue()


def main(out: Path, dies: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    workers, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: dict[str, Any] = {}
    found["choices"] = choices(out, workers, dies=3 if dies else None)
    found["labels"] = labels(out, workers)
    try:
        choices(out, workers)
    except ValueError as error:
        found["again"] = str(error)
    try:
        choices(out, workers, resume=True, per_device_train_batch_size=6)
    except ValueError as error:
        found["other batch"] = str(error)
    found["default"] = default(out, workers)
    found["command"] = command(out, rank)
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    forked.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "dies" in sys.argv[2:])
