"""What other orders of a run's examples would have given: equal to retraining where the loss is linear, first order in η elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zotune
from zotune.attribution import orders
from zotune.attribution.proposals import Known, moved, proposals
from zotune.optim.journal import Journal
from zotune.optim.replay import before_steps
from zotune.optim.slopes import SlopeMeter, check

N, STEPS, SIZE = 12, 8, 3


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 4)


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 6, generator=generator), torch.randn(N, 4, generator=generator)


def _linear(model: nn.Module) -> Any:
    return lambda batch: (model(batch[0]) * batch[1]).sum(dim=1)


def _quadratic(model: nn.Module) -> Any:
    return lambda batch: (model(batch[0]) - batch[1]).square().sum(dim=1)


def _order(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [row for _ in range(2) for row in torch.randperm(N, generator=generator).tolist()]
    return [rows[at : at + SIZE] for at in range(0, STEPS * SIZE, SIZE)]


def _trained(loss: Any, method: Any, lr: float, order: list[list[int]], journal: Path | None = None) -> nn.Module:
    model, (x, y) = _model(), _data()
    optimizer = zotune.ZerothOrder(model, method, lr=lr, journal=journal)
    for rows in order:
        optimizer.step(loss(model), (x[rows], y[rows]))
    optimizer.remove_hooks()
    return model


def _told(
    loss: Any, method: Any, lr: float, tmp_path: Path, order: list[list[int]]
) -> tuple[nn.Module, orders.RunSlopes, orders.Reordered]:
    """The model of another order, from the run of order 0."""
    path = tmp_path / f"{lr}.zo"
    end = _trained(loss, method, lr, _order(0), path)
    journal, (x, y), model = Journal.open(path), _data(), _model()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = before_steps(model, journal, method=method)
    run = orders.measure(optimizer, journal, SlopeMeter(optimizer, loss(model), [(x, y)], N), _order(0))
    optimizer.remove_hooks()
    for name, value in end.named_parameters():
        assert torch.equal(model.get_parameter(name), value), "measuring leaves the replayed weights as they are"
    model = _model()
    optimizer = before_steps(model, journal, method=method)
    meter = SlopeMeter(optimizer, loss(model), [(x, y)], N)
    batches = {step: [(x[order[step]], y[order[step]])] for step in range(1, STEPS)}
    ends = (start, {name: value.detach() for name, value in end.named_parameters()})
    found = orders.replay(optimizer, run, order, meter, loss_fn=loss(model), batches=batches, ends=ends)
    return model, run, found


@pytest.mark.parametrize("name", ["mezo", "lozo", "mezo-momentum", "mezo-adam", "fzoo", "zo-block", "lozo-m"])
def test_a_linear_loss_is_told_as_it_is_retrained(name: str, tmp_path: Path) -> None:
    method, order = zotune.methods.get(name), _order(5)
    lr = 1e-4 if name == "fzoo" else 1e-2  # its steps are of one length
    model, run, found = _told(_linear, method, lr, tmp_path, order)
    assert run.mismatch < 3e-3  # rounding; of points on one side more
    other = _trained(_linear, method, lr, order)
    pairs = [
        (model.get_parameter(each).detach(), value.detach(), _model().get_parameter(each).detach())
        for each, value in other.named_parameters()
    ]
    difference = sum(float((told - value).square().sum()) for told, value, _ in pairs)
    assert difference < 1e-4 * sum(float((value - start).square().sum()) for _, value, start in pairs)  # 1 % of the way
    assert found.error < 3e-3 and found.apart > 0.01


def test_the_error_of_the_coefficients_is_first_order_in_the_rate(tmp_path: Path) -> None:
    errors = [_told(_quadratic, zotune.methods.get("mezo"), lr, tmp_path, _order(5))[2].error for lr in (4e-4, 1e-4)]
    assert 2.5 < errors[0] / errors[1] < 6 and errors[0] > 0.001  # 4, up to second order


def test_the_order_of_another_run_does_not_match(tmp_path: Path) -> None:
    path = tmp_path / "j.zo"
    _trained(_quadratic, "mezo", 1e-4, _order(0), path)
    journal, (x, y), model = Journal.open(path), _data(), _model()
    optimizer = before_steps(model, journal)
    run = orders.measure(optimizer, journal, SlopeMeter(optimizer, _quadratic(model), [(x, y)], N), _order(1))
    assert run.mismatch > 0.1


@pytest.mark.parametrize(
    "name", ["lozo-g", "lozo-e", "agzo", "hizoo", "bszo", "mezo-svrg", "es-ranks", "randopt", "forward-grad", "pseuzo"]
)
def test_methods_without_such_slopes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"other orders cannot be told for {name}, .*: take mezo, lozo"):
        check(zotune.methods.get(name))


def _known() -> Known:
    own = [[0, 1], [2, 3], [1, 0], [3, 2]]
    return Known(own, [11, 12, 13, 14], [5, 9, 3, 4], [0.1, 0.4, 0.3, 0.2])


def test_orders_by_name_are_those_of_their_keys() -> None:
    known = _known()
    steps = {name: proposals(name, known)[0].steps for name in ("shortest", "longest", "easiest", "hardest", "reversed")}
    assert steps["shortest"] == [[2, 3], [0, 1]] * 2 and steps["longest"] == [[1, 0], [3, 2]] * 2
    assert steps["easiest"] == [[0, 3], [2, 1]] * 2 and steps["hardest"] == [[1, 2], [3, 0]] * 2
    assert steps["reversed"] == [[2, 3], [0, 1], [3, 2], [1, 0]]
    several = proposals("random:3", known)
    assert len({str(each.steps) for each in several}) == 3
    assert all(sorted(rows[0] + rows[1]) == [0, 1, 2, 3] for each in several for rows in (each.steps[:2], each.steps[2:]))


def test_a_file_is_one_pass_or_all_steps(tmp_path: Path) -> None:
    known, file = _known(), tmp_path / "order.txt"
    file.write_text("14\n13\n\n12\n11\n")
    assert proposals(str(file), known)[0].steps == [[3, 2], [1, 0]] * 2
    file.write_text("\n".join(["11"] * 8))
    assert proposals(str(file), known)[0].steps == [[0, 0]] * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("11\n99\n", "line 2: '99' is not the number of a training row"),
        ("11\n", "write 4, each .* or 8"),
        ("11\n" * 4, "names a row twice"),
    ],
)
def test_a_file_that_is_no_order_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "order.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        proposals(str(tmp_path / "order.txt"), _known())


def test_an_unknown_order_names_the_near_one() -> None:
    with pytest.raises(ValueError, match="shortest"):
        proposals("shortes", _known())


def test_a_row_trades_places_within_the_last_pass() -> None:
    found = moved(_known(), 0, 4)  # its visits: steps 0 and 2
    assert [step for step, _ in found] == [1, 2, 3]
    assert [each.steps for _, each in found] == [
        [[0, 1], [0, 3], [1, 2], [3, 2]],
        _known().own,
        [[0, 1], [2, 3], [1, 3], [0, 2]],
    ]
