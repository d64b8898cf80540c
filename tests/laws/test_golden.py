"""Every method still goes the way it went when its trajectory was put on file."""

from __future__ import annotations

import pytest

import golden_runs
import toys


@pytest.mark.parametrize("name", toys.names())
def test_ten_steps_are_those_on_file(name):
    if not (golden_runs.FOLDER / f"{name}.csv").is_file():
        pytest.fail(f"no trajectory of {name} on file; run: python tests/helpers/golden_runs.py {name}")
    for found, expected in zip(golden_runs.trajectory(name), golden_runs.read(name), strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_another_seed_goes_another_way():
    """The comparison above can fail."""
    assert golden_runs.trajectory("mezo", seed=8)[-1] != pytest.approx(golden_runs.read("mezo")[-1], rel=2e-3, abs=2e-3)
