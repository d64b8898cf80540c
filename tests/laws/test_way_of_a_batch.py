"""The way of a batch is the one that ``zotune.optim`` describes: from training to the update, each file once, downward."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import zotune
import zotune.optim
from trainer_cases import trainer
from zotune.training.trainer import ZOTrainer

ROOT = Path(zotune.__file__).parent
LINE = re.compile(r"^    (\S+\.py) +(\S+)", re.MULTILINE)
LEGS = [LINE.findall(leg) for leg in re.split(r"\n(?=\S)", zotune.optim.__doc__ or "") if LINE.search(leg)]
WAY = [place for leg in LEGS for place in leg]


def called_in(step: Callable[[], Any]) -> list[tuple[str, str]]:
    """The functions of zotune that ``step`` calls, (file, qualified name), in the order of their first calls."""
    found: dict[tuple[str, str], None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            found.setdefault((path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return list(found)


def test_a_step_goes_that_way(tmp_path, monkeypatch):
    calls: list[list[tuple[str, str]]] = []
    training_step = ZOTrainer.training_step

    def traced(self: ZOTrainer, *args: Any, **kwargs: Any) -> Any:
        results = []
        calls.append(called_in(lambda: results.append(training_step(self, *args, **kwargs))))
        return results[0]

    monkeypatch.setattr(ZOTrainer, "training_step", traced)
    trainer(tmp_path, method="lozo", max_steps=2).train()
    assert [place for place in calls[-1] if place in WAY] == WAY


def test_it_visits_each_file_once_and_goes_down():
    files = [file for file, _ in WAY]
    assert len(WAY) > 15 and len(set(files)) == len(files)
    config = tomllib.loads((ROOT.parent.parent / "pyproject.toml").read_text())
    order = config["tool"]["importlinter"]["contracts"][0]["layers"]
    for leg in LEGS:
        packages = [order.index(file.split("/")[0]) for file, _ in leg]
        assert all(above <= below for above, below in pairwise(packages)), leg
