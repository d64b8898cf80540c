"""What `accelerate launch` was asked for is read from its own words, and what it did not start is not passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

import zotune
from zotune.training import accelerate_launch
from zotune.training.accelerate_launch import Asked


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python /bin/accelerate launch --num_processes 2 --cpu -m zotune train", Asked(2, 1)),
        ("python -m accelerate.commands.launch --cpu --num-processes=4 train.py --num_processes 3", Asked(4, 1)),
        ("/bin/accelerate-launch --num_processes 4 --num_machines 2 --machine_rank 1 train.py", Asked(4, 2)),
        ("accelerate launch --num_processes 1 --cpu train.py", None),
        ("accelerate launch --config_file {config} train.py", Asked(3, 1)),
        ("python train.py launch --num_processes 2", None),
        ("bash -c accelerate", None),
    ],
)
def test_processes_asked_for_stand_in_the_words(line: str, found: Asked | None, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_CPU, mixed_precision: 'no', num_machines: 1, num_processes: 3, "
        "use_cpu: true}"
    )
    words = accelerate_launch._after_launch(line.format(config=tmp_path / "config.yaml").split())
    assert (accelerate_launch._parsed(words) if words else None) == found


def test_one_process_in_place_of_two_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a script: the command starts them by itself."""
    monkeypatch.setattr(accelerate_launch, "asked", lambda: Asked(2, 1))
    monkeypatch.setattr(accelerate_launch.sys, "orig_argv", ["python", "-u", "train.py", "--rate", "1e-3"])
    with pytest.raises(ValueError, match=r"asked for 2 .* by `torchrun --standalone --nproc-per-node 2 train.py --rate 1e-3`"):
        zotune.ZOConfig(output_dir=str(tmp_path), learning_rate=1e-3)


def test_another_launchers_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert accelerate_launch.asked() is None, "the parent is no accelerate"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert accelerate_launch.asked() is None
