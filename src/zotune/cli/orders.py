"""`zotune orders`: what other orders of a run's examples would have given, without training again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from zotune.attribution import orders
from zotune.attribution.orders import Reordered, RunSlopes
from zotune.attribution.proposals import HELP, Known, Proposal, moved, proposals
from zotune.attribution.shares import journal_path
from zotune.cli.parser import CommandParser
from zotune.cli.replay import base_model, new_folder
from zotune.cli.table import wide_table
from zotune.io.atomic import write_text
from zotune.io.text import metric_text
from zotune.methods import get
from zotune.optim import slopes
from zotune.optim.journal import Journal
from zotune.optim.replay import before_steps, checked_header
from zotune.tasks import PreparedData
from zotune.training import run_folder
from zotune.training.checkpoint import contents, storage
from zotune.training.evaluation import measured
from zotune.training.quiet import quiet_libraries
from zotune.training.rebuilt import rebuilt_trainer
from zotune.training.samplers import lengths_of
from zotune.training.trainer import ZOTrainer
from zotune.weights import trainable_scales

ABOUT = (
    "Tells what other orders of the same examples would have given, without training again: measures every example along the run's own "
    "directions once, computes the coefficients of each order from that, and replays the journal with them. The losses are those of the "
    "weights that come out."
)
#: ‖c − c'‖ / ‖c‖ of the run's own order, at most: rounding, and points on one side of θ. Above, what was rebuilt is not the run.
SAME = 0.02
#: Error of the checked coefficients beyond which an order is said to be too far from the run.
FAR = 0.5


def main(argv: Sequence[str]) -> int:
    """Runs `zotune orders`."""
    parser = CommandParser("zotune orders", ABOUT)
    parser.add_argument("base", help="the base model: a folder or a hub id")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--order", nargs="+", default=[], metavar="FILE", help=HELP)
    parser.add_argument(
        "--position", nargs="+", type=int, default=[], metavar="ROW",
        help="numbers of training rows: the loss of each at the end, by the step of its last visit",
    )  # fmt: skip
    parser.add_argument("--places", type=int, default=6, help="with --position: steps to move a row to (default 6)")
    parser.add_argument(
        "--checks", type=int, default=4, help="steps of each order whose coefficients are measured, to say how far they are off (default 4)"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON Lines to write the results to, with the loss of every training row")
    parser.add_argument("--output_dir", metavar="DIR", help="folder for the model of the best order; must not exist or be empty")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    args = parser.parse(argv)
    if not args.order and not args.position:
        raise ValueError("nothing to try: name orders (--order FILE, --order random:10 shortest), or rows (--position ROW).")
    for name, least in (("places", 2), ("checks", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}.")
    output = None if args.output_dir is None else new_folder(args.output_dir, "zotune orders", "best")
    quiet_libraries()
    path = journal_path(args.run, run_folder.JOURNAL_FILE)
    journal = Journal.open(path)
    header = checked_header(journal)
    slopes.check(get(header["method"], **header["options"]))
    model, tokenizer = base_model(args.base, journal, path.parent, trust_remote_code=args.trust_remote_code, use_cpu=args.use_cpu)
    with tempfile.TemporaryDirectory(prefix="zotune-orders-") as scratch:
        trainer, data = rebuilt_trainer(path.parent, model, tokenizer, scratch, use_cpu=args.use_cpu)
        study = _Study(journal, model, trainer, data, args.checks)
        found = [study.result(each) for given in args.order for each in proposals(given, study.known)]
        if found:
            print(_orders_table(study, found))
        memory = [(row, _positions(study, row, args.places)) for row in args.position]
        for row, places in memory:
            print(_position_table(study, row, places))
        for warning in study.warnings([*found, *(each for _, places in memory for _, each in places)]):
            print(f"Warning: {warning}")
        if args.out is not None:
            lines = [each.as_json(study) for each in [study.as_trained, *found, *(each for _, places in memory for _, each in places)]]
            write_text(Path(args.out).expanduser(), "".join(line + "\n" for line in lines))
        if output is not None:
            best = min([study.as_trained, *found], key=lambda each: each.criterion(data.main_metric))
            study.restore(best)
            with storage.draft(output) as folder:
                contents.save_model(folder, trainable_scales.dequantize(model).cpu())
                tokenizer.save_pretrained(folder)
                numbers = [str(study.known.numbers[row]) for rows in best.proposal.steps for row in rows]
                (folder / "order.txt").write_text("\n".join(numbers) + "\n", encoding="utf-8")
            print(f"{output}: the model of {best.proposal.name}, and its order.txt.")
    return 0


@dataclass(frozen=True)
class _Result:
    """An order, what its replay gave, and metrics of the evaluation data."""

    proposal: Proposal
    found: Reordered
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        return float(self.found.losses.mean())

    def criterion(self, metric: str) -> float:
        """Less is better: the loss of the evaluation data, or the metric of the task; else the training loss."""
        if "loss" in self.metrics:
            return self.metrics["loss"]
        return -self.metrics[metric] if metric in self.metrics else self.loss

    def as_json(self, study: _Study) -> str:
        return json.dumps(
            {
                "order": self.proposal.name,
                "training_loss": self.loss,
                **self.metrics,
                "coefficient_error": None if np.isnan(self.found.error) else self.found.error,
                "apart": self.found.apart,
                "losses": {str(number): loss for number, loss in zip(study.known.numbers, self.found.losses.tolist(), strict=True)},
            }
        )


class _Study:
    """A run with its slopes, and replays of it."""

    def __init__(self, journal: Journal, model: nn.Module, trainer: ZOTrainer, data: PreparedData, checks: int) -> None:
        assert data.train is not None and data.train_rows is not None
        self.journal, self.model, self.trainer, self.data, self.checks = journal, model, trainer, data, checks
        self.random = np.random.default_rng(0)
        self.own = trainer.rows_of_steps(len(journal))
        loss_fn, batches = trainer.losses_on(data.train)
        self.loss_fn, self.train = loss_fn, data.train
        optimizer = before_steps(model, journal)
        self.points = len(optimizer.estimator.points(optimizer.method.directions_of(0)))
        trained = [coordinate.name for coordinate in optimizer.forward.coordinates]
        self._start = self._weights(trained)
        count = len(data.train)
        self._meter = lambda optimizer: slopes.SlopeMeter(optimizer, loss_fn, batches, count)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("measuring the examples along the run's steps", total=len(journal))
            self.run: RunSlopes = orders.measure(optimizer, journal, self._meter(optimizer), self.own, lambda: progress.advance(task))
        optimizer.remove_hooks()
        self._end = self._weights(trained)
        if self.run.mismatch > SAME:
            raise ValueError(
                f"the coefficients that the run recorded are not those of its examples as they are read now (difference "
                f"{self.run.mismatch:.0%}): the order of its batches, or its loss, cannot be rebuilt here."
            )
        lengths = lengths_of(data.train, "length") or [0] * len(data.train)
        self.known = Known(self.own, list(data.train_rows.numbers), lengths, self.run.losses[0].tolist())
        own = Proposal("as trained", self.own)
        self.as_trained = _Result(own, Reordered(self.run.losses[1], 0.0, 0.0), self._metrics())

    def _weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().cpu().clone() for name in names}

    def restore(self, best: _Result) -> None:
        """Gives the model the weights of an order."""
        if best is not self.as_trained:
            self.result(best.proposal)
            return
        for name, value in self._end.items():
            self.model.get_parameter(name).data.copy_(value)

    def _metrics(self) -> dict[str, float]:
        if self.data.eval is None:
            return {}
        found = measured(self.trainer, self.data.eval)
        return {name: value for name, value in found.items() if name in ("loss", self.data.main_metric)}

    def result(self, proposal: Proposal) -> _Result:
        """Replays an order; the model has its weights afterwards."""
        for name, value in self._start.items():
            self.model.get_parameter(name).data.copy_(value)
        optimizer = before_steps(self.model, self.journal, known=True)
        steps = len(proposal.steps)
        chosen = self.random.permutation(steps)[: self.checks].tolist()
        batches = {step: self.trainer.losses_on([self.train[row] for row in proposal.steps[step]])[1] for step in chosen}
        ends = (self._start, self._end)
        found = orders.replay(optimizer, self.run, proposal.steps, self._meter(optimizer), loss_fn=self.loss_fn, batches=batches, ends=ends)
        return _Result(proposal, found, self._metrics())

    def warnings(self, results: Sequence[_Result]) -> list[str]:
        """Orders that are too far from the run."""
        far = [each for each in results if each.found.error > FAR]
        if not far:
            return []
        worst = max(far, key=lambda each: each.found.error)
        return [
            f"the coefficients of {len(far)} of {len(results)} orders are off by more than {FAR:.0%} where they were checked (most: "
            f"{worst.proposal.name}, {worst.found.error:.0%}): they lead too far from the run for its slopes to hold. Trust their losses "
            "less, and take a run of a lower learning rate."
        ]


def _orders_table(study: _Study, found: Sequence[_Result]) -> str:
    sequences = sum(map(len, study.own))
    spent = len(study.own) * len(study.known.numbers) * study.points
    names = list(study.as_trained.metrics)
    rows = [_row(each, names) for each in [study.as_trained, *sorted(found, key=lambda each: each.loss)]]
    title = (
        f"{len(found)} orders of {len(study.known.numbers)} examples in {len(study.own)} steps. Measuring took {spent} sequences, as many "
        f"as training {spent / (sequences * study.points):.3g} times; further orders take none of it again."
    )
    header = ("order", "training loss", *(f"evaluation {name}" for name in names), "error of c", "apart")
    return title + "\n" + wide_table(header, rows)


def _row(each: _Result, names: Sequence[str]) -> tuple[str, ...]:
    own = each.proposal.name == "as trained"
    error = "" if own or np.isnan(each.found.error) else f"{each.found.error:.0%}"
    metrics = [metric_text(name, each.metrics[name]) for name in names]
    return (each.proposal.name, f"{each.loss:.4f}", *metrics, error, "" if own else f"{each.found.apart:.2f}")


def _positions(study: _Study, number: int, places: int) -> list[tuple[int, _Result]]:
    if number not in study.known.numbers:
        raise ValueError(f"--position {number}: the run has no training row of that number.")
    row = list(study.known.numbers).index(number)
    return [(step, study.result(each)) for step, each in moved(study.known, row, places)]


def _position_table(study: _Study, number: int, places: Sequence[tuple[int, _Result]]) -> str:
    row = list(study.known.numbers).index(number)
    last = max(step for step, rows in enumerate(study.own) if row in rows)
    before, after = (float(study.run.losses[at, row]) for at in (0, 1))
    rows: list[tuple[Any, ...]] = [
        (str(step) + (" (its own)" if step == last else ""), f"{float(each.found.losses[row]):.4f}", f"{each.loss:.4f}")
        for step, each in places
    ]
    title = f"Row {number}: loss {before:.4f} before training, {after:.4f} after the run, by the step of its last visit."
    return title + "\n" + wide_table(("step", "its loss at the end", "loss of all rows"), rows)
