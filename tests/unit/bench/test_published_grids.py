"""The dry runs of the grids of published tables: for every method the settings that its paper's code has."""

from __future__ import annotations

import itertools
import re
import shlex
from functools import cache
from typing import Any

import pytest

import paths
from command_cases import run_command
from zotune import bench
from zotune.bench.plan import cells, runs_of, words

FOLDER = paths.ROOT / "benchmarks/grids"
SHOWN = (
    "objective", "loss_over", "template", "bos_token", "dtype", "per_device_train_batch_size", "max_steps", "num_train_epochs", "k_shot",
    "num_train", "num_dev", "num_eval", "eval_steps", "lr_scheduler_type", "metric_for_best_model", "train_sampling_strategy",
)  # fmt: skip
#: Options that a cell may try.
TRIED = ("eps", "learning_rate", "rank", "interval", "momentum", "num_directions")

#: What the runs of the grids on OPT with 1,000 examples share, in the order of `SHOWN`.
OPT = "choices - mezo <s> float16 16 20000 - - 1000 500 1000 4000 constant loss random"
OPT_TOKENS = OPT.replace("choices -", "lm tokens")
BACKPROP = "choices - mezo <s> float32 8 - 5 - 1000 500 1000 - linear loss random"
FEW_SHOT = "mlm - mask - float32 64 100000 - 16 - {} 1000 10000 constant accuracy random"
ZO_BENCH = "choices - mezo - float32 16 20000 - - 1000 500 1000 500 constant loss random"
EVALUATES = "- - mezo <s> float16 - - - - - - 1000 - - - -"

FULL = "eps=0.0001,0.001,1e-05 learning_rate=0.0001,1e-05,1e-06,1e-07,1e-08"
#: grid -> (model, task, scheme, method by their labels, None: any) -> (the values of `SHOWN`, what is tried).
PINNED: dict[str, dict[tuple[str | None, ...], tuple[str, str]]] = {
    "mezo_table1": {
        (None, "SST-2", "full", "MeZO"): (OPT, "eps=0.001 learning_rate=1e-06,1e-07"),
        (None, "CB", "full", "MeZO"): (OPT.replace(" 500 ", " 100 "), "eps=0.001 learning_rate=1e-06,1e-07"),
        (None, "COPA", "LoRA", "MeZO"): (OPT_TOKENS.replace(" 500 ", " 100 "), "eps=0.01 learning_rate=0.0001,5e-05"),
        (None, "ReCoRD", "prefix", "MeZO"): (OPT_TOKENS, "eps=0.1 learning_rate=0.001,0.01"),
        (None, "SQuAD", "full", "MeZO"): (OPT_TOKENS, "eps=0.001 learning_rate=1e-06,1e-07"),
        (None, "DROP", "full", "MeZO"): (OPT_TOKENS, "eps=0.001 learning_rate=1e-06,1e-07"),
        (None, "MultiRC", "full", "FT"): (BACKPROP, "learning_rate=1e-05,5e-05,8e-05"),
        (None, "BoolQ", "full", "ICL"): (EVALUATES, ""),
        (None, "BoolQ", "full", "zero-shot"): (EVALUATES, ""),
        (None, "WSC", "full", "linear probing"): (EVALUATES.replace("float16 - - - - -", "float32 - - - - 1000"), ""),
    },
    "lozo_table2": {
        (None, "RTE", "full", "LOZO"): (OPT, "eps=0.001 interval=100,50 learning_rate=1e-06,1e-07 rank=1,2"),
        (None, "DROP", "full", "LOZO"): (OPT_TOKENS, "eps=0.001 interval=100,50 learning_rate=1e-06,1e-07 rank=1,2"),
        (None, "WiC", "full", "MeZO"): (OPT, "eps=0.001 learning_rate=1e-06,1e-07"),
        (None, "WiC", "full", "FT"): (BACKPROP, "learning_rate=1e-05,5e-05,8e-05"),
    },
    "mezo_roberta": {
        (None, "TREC", "full", "MeZO"): (FEW_SHOT.format(96), "eps=0.001 learning_rate=1e-05,1e-06,1e-07"),
        (None, "SST-2", "full", "FT"): (
            FEW_SHOT.format(32).replace(" 64 100000 ", " 8 1000 ").replace(" 10000 constant", " 100 linear"), "learning_rate=1e-05",
        ),
        (None, "MNLI", "full", "LOZO"): (FEW_SHOT.format(48), "eps=0.001 interval=100,50 learning_rate=1e-06,1e-07 rank=4"),
        (None, "SNLI", "full", "LOZO-M"): (FEW_SHOT.format(48), "eps=0.001 interval=100,50 learning_rate=1e-06,1e-07 momentum=0.9 rank=4"),
        (None, "RTE", "full", "zero-shot"): ("mlm - mask - float32 - - - - - - 1000 - - - -", ""),
    },
    "mezo_roberta_512": {
        (None, "SNLI", "full", "MeZO"): (FEW_SHOT.format(1536).replace(" 16 ", " 512 "), "eps=0.001 learning_rate=1e-05,1e-06,1e-07"),
    },
    "zobench_sst2": {
        ("OPT-1.3B", None, "full", "FO-SGD"): (
            ZO_BENCH.replace(" 16 20000 -", " 8 - 5").replace(" 500 constant", " - constant"),
            "learning_rate=0.0001,0.001,1e-05,1e-06,1e-07",
        ),
        ("OPT-1.3B", None, "LoRA", "FO-SGD"): (ZO_BENCH, "learning_rate=0.0001,0.001,0.01,1e-05,1e-06"),
        ("OPT-1.3B", None, "full", "Forward-Grad"): (ZO_BENCH, "learning_rate=1e-05,1e-06,1e-07,1e-08,5e-07"),
        ("LLaMA-7B", None, "full", "ZO-SGD"): (ZO_BENCH, FULL),
        ("OPT-1.3B", None, "LoRA", "ZO-SGD"): (ZO_BENCH, "eps=0.0001,0.001,0.01 learning_rate=0.0001,0.001,1e-05,1e-06"),
        ("OPT-1.3B", None, "prefix", "ZO-SGD"): (ZO_BENCH, "eps=0.1 learning_rate=0.0001,0.001,0.01"),
        ("OPT-1.3B", None, "prompt", "ZO-SGD"): (ZO_BENCH, "eps=0.0001,0.001,0.01 learning_rate=0.0001,0.001,1e-05,1e-06"),
        ("OPT-1.3B", None, "full", "ZO-SGD-MMT"): (
            ZO_BENCH, "eps=0.0001,0.001,1e-05 learning_rate=1e-05,1e-06,1e-07,1e-08 momentum=0.9",
        ),
        ("OPT-1.3B", None, "full", "ZO-SGD-Cons"): (ZO_BENCH, "eps=0.0001,0.001,0.01 learning_rate=1e-05,1e-06,1e-07,1e-08"),
        ("OPT-1.3B", None, "full", "ZO-SGD-Sign"): (ZO_BENCH, "eps=0.001,1e-05 learning_rate=0.0001,1e-06,1e-08"),
        ("OPT-1.3B", None, "full", "ZO-Adam"): (ZO_BENCH, FULL),
        ("OPT-1.3B", None, "LoRA", "ZO-Adam"): (ZO_BENCH, "eps=0.0001,0.001,0.01,1e-05 learning_rate=0.0001,1e-05,1e-06"),
        ("RoBERTa-large", None, "full", "ZO-SGD"): (
            ZO_BENCH.replace("choices - mezo", "mlm - mask"), FULL,
        ),
    },
    "jaguar": {
        ("OPT-1.3B", None, "full", "ZO-SGD"): (ZO_BENCH.replace(" 500 constant", " 1000 constant"), FULL),
        (None, None, None, "JAGUAR-Muon"): ("", "eps=0.005 learning_rate=0.0001,0.001,1e-05 momentum=0.1"),
    },
    "fzoo": {
        (None, "SST-2", "full", "FZOO"): (OPT, "eps=0.0001 learning_rate=5e-09 num_directions=8"),
        (None, "COPA", "full", "FZOO"): (OPT_TOKENS.replace(" 500 ", " 100 "), "eps=0.0001 learning_rate=5e-09 num_directions=8"),
        (None, "SST-2", "full", "MeZO"): (OPT, "eps=0.001 learning_rate=1e-06,1e-07"),
    },
}  # fmt: skip


@cache
def settings(name: str) -> dict[tuple[str, ...], tuple[str, str]]:
    """place -> the values of `SHOWN` and those tried, by the words that a dry run prints."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    grid = bench.load(FOLDER / f"{name}.yaml")
    for place, several in cells(grid).items():
        of_cells = [values(words(runs_of(cell, grid.seeds)[0], FOLDER, None)) for cell in several]
        assert len({tuple(each.get(option) for option in SHOWN) for each in of_cells}) == 1
        tried = {option: sorted({each[option] for each in of_cells}) for option in sorted(TRIED) if option in of_cells[0]}
        for each in itertools.product(*([label, None] for label in (place.model, place.task, place.scheme, place.method))):
            shown = " ".join(of_cells[0].get(option, "-") for option in SHOWN)
            found.setdefault(each, (shown, " ".join(f"{option}={','.join(several)}" for option, several in tried.items())))
    return found


def values(command: list[str]) -> dict[str, str]:
    return dict(re.fullmatch(r"--(\w+)=(.*)", word, re.S).groups() for word in command if re.match(r"--\w+=", word))  # type: ignore[misc,union-attr]


@pytest.mark.parametrize("name", PINNED)
def test_a_grid_has_the_published_settings(name: str) -> None:
    found = settings(name)
    for place, (shown, tried) in PINNED[name].items():
        assert found[place][1] == tried, place
        assert not shown or found[place][0] == shown, place


def test_a_dry_run_prints_the_words_of_the_plan(capsys: Any) -> None:
    result = run_command(capsys, "bench", str(FOLDER / "mezo_roberta.yaml"), "--dry_run")
    assert result.code == 0, result.err
    printed = [values(shlex.split(line)) for line in result.out.splitlines() if line.startswith("zotune train ")]
    mezo = [each for each in printed if (each["task"], each["method"], each["seed"]) == ("snli", "mezo", "13")]
    assert [float(each["learning_rate"]) for each in mezo] == [1e-7, 1e-6, 1e-5]
    assert all(" ".join(each.get(option, "-") for option in SHOWN) == FEW_SHOT.format(48) for each in mezo)
    assert all(each["protocol"] == "lozo" and each["eps"] == "0.001" for each in mezo)
