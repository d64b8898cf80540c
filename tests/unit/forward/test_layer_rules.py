"""Every layer type: all ways of evaluating it at θ + offset are one function, up to rounding. A new rule is covered by being registered."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import zotune.forward.layers
from zotune.forward import lazy_weight, materialized
from zotune.forward.batches import assign_directions, assigned_layout, shared_layout
from zotune.forward.layers import RULES, Example, LayerRule, register, rule_of
from zotune.forward.lazy_weight import LazyWeight
from zotune.forward.materialized import MaterializedWeight
from zotune.forward.model import PerturbedForward
from zotune.methods.estimators import Point
from zotune.rng.directions import Directions
from zotune.subspaces import Full, LowRank, LowRankCoordinate
from zotune.subspaces.coordinate import Coordinate, Offset
from zotune.subspaces.projected import Left

SEED, STEP, EPS, ROWS = 3, 6, 1.0, 4
EXAMPLES = {f"{name}: {example.label}": example for name, rule in RULES.items() for example in rule.examples()}
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SUBSPACES = {"full": Full(), "low rank": LowRank(rank=3, interval=5), "low rank, left fixed": Left(rank=3, interval=5)}

every_layer = pytest.mark.parametrize("dtype", DTYPES, ids=str)
examples = pytest.mark.parametrize("case", EXAMPLES)
subspaces = pytest.mark.parametrize("kind", SUBSPACES)


def layer(case: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The module and its inputs."""
    example: Example = EXAMPLES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = example.build().eval(), example.inputs(ROWS)
    return module.to(dtype), inputs.to(dtype) if inputs.is_floating_point() else inputs


def probe_of(module: nn.Module, kind: str, pending: bool = True) -> PerturbedForward:
    """A forward of θ ≠ 0."""
    coordinates = [SUBSPACES[kind].coordinate(name, p) for name, p in module.named_parameters()]
    forward = PerturbedForward(module, coordinates, Directions("gaussian"))
    for coordinate in coordinates:
        coordinate.begin_step(SEED, 5)
        if pending:
            coordinate.descend(forward.directions, [0.1], 1.0, SEED, 5)
    return forward


def whole(forward: PerturbedForward, module: nn.Module, x: Tensor, scale: float, direction: int = 0) -> Tensor:
    """The layer computed with whole perturbed weights, by torch alone: what every way is to agree with."""
    offset = Offset(scale, SEED, STEP, direction) if scale else None
    weights = {c.name: c.at(forward.directions, offset) for c in forward.coordinates}
    with torch.no_grad(), forward.at(None):
        for coordinate in forward.coordinates:
            if isinstance(coordinate, LowRankCoordinate):
                coordinate.hook_core = None  # no hook adds to it
        return functional_call(module, weights, x)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by rounding, in the mean."""
    return found.dtype == expected.dtype and bool((found.double() - expected.double()).norm() <= DTYPES[dtype] * expected.double().norm())


def skip_unless_trainable(case: str, kind: str) -> None:
    if kind == "full" and not RULES[case.split(":")[0]].writable:
        pytest.skip("its weight is never written")


@examples
@every_layer
@subspaces
@pytest.mark.parametrize("pending", [True, False])
def test_one_point(case, dtype, kind, pending):
    """With hooks where there are any, in the general way elsewhere."""
    skip_unless_trainable(case, kind)
    module, x = layer(case, dtype)
    forward = probe_of(module, kind, pending)
    stored = [p.detach().clone() for p in module.parameters()]
    for scale in (EPS, -EPS):
        found = forward.evaluate(lambda: module(x), Offset(scale, SEED, STEP, 0))
        expected = whole(forward, module, x, scale)
        assert agree(found, expected, dtype)
        assert not agree(found, whole(forward, module, x, 0.0), dtype), "the offset makes no difference"
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), stored, strict=True))


@examples
@every_layer
@subspaces
def test_the_general_way(case, dtype, kind, monkeypatch):
    """Lazy weights too: strips and rows are made from the smallest size on."""
    skip_unless_trainable(case, kind)
    for bound, value in {"LARGE": 100, "STRIP": 1700, "LOW_RANK_STRIP": (1700, 1700)}.items():
        monkeypatch.setattr(lazy_weight, bound, value)
    module, x = layer(case, dtype)
    forward = probe_of(module, kind)
    offset = Offset(EPS, SEED, STEP, 0)
    with torch.no_grad(), forward.at(offset, hooks=False):
        found = module(x)
    assert type(found) is Tensor and agree(found, whole(forward, module, x, EPS), dtype)


@examples
@every_layer
@subspaces
@pytest.mark.parametrize("own_directions", [False, True])
def test_batched(case, dtype, kind, own_directions):
    """All points in one forward of stacked rows: a direction for all rows, or one for each."""
    skip_unless_trainable(case, kind)
    module, x = layer(case, dtype)
    forward = probe_of(module, kind)
    if own_directions and not all(c.thin for c in forward.coordinates):
        pytest.skip("a matrix in full space has one direction a forward")
    if own_directions:
        stack = assigned_layout((1, -1), EPS, assign_directions([ROWS], ROWS, 1)[0], SEED, STEP)
    else:
        stack = shared_layout([Point(+1, 0), Point(-1, 0)], EPS, ROWS, SEED, STEP)
    found = forward.evaluate_batched(lambda: module(x[stack.source]), stack)
    for losses, scale in zip(stack.losses, (EPS, -EPS), strict=True):
        for row, place in enumerate(losses.tolist()):
            expected = whole(forward, module, x[row : row + 1], scale, row if own_directions else 0)
            assert agree(found[place : place + 1], expected, dtype), (scale, row)


@pytest.fixture
def product_kernel(monkeypatch) -> Callable[[float], None]:
    """Gives a CPU what materializes a weight: as a rule a kernel of an accelerator does."""

    def plus(weight: Tensor, residual: None, left: Tensor, right: Tensor) -> Tensor:
        return (weight.float() + left.float() @ right.float().T).to(weight.dtype)

    monkeypatch.setattr(materialized, "kernel_of", lambda coordinate: SimpleNamespace(add_low_rank=plus))
    return lambda passes: monkeypatch.setattr(materialized, "PASSES", passes)


@examples
@every_layer
@pytest.mark.parametrize("passes", [0.0, math.inf], ids=["materialized", "thin products"])
def test_materialized(case, dtype, passes, product_kernel):
    """One point, and all of them, with a materialized weight or with thin products."""
    product_kernel(passes)
    module, x = layer(case, dtype)
    forward = probe_of(module, "low rank")
    expected = whole(forward, module, x, EPS)
    with torch.no_grad(), forward.at(Offset(EPS, SEED, STEP, 0)):
        weight = getattr(module, "weight", None)
        rule = rule_of(module)
        coordinate = next(c for c in forward.coordinates)
        formable = rule is not None and isinstance(coordinate, LowRankCoordinate) and rule.materializes(module, coordinate)
        assert isinstance(weight, MaterializedWeight) == formable
        assert agree(module(x), expected, dtype)
    stack = shared_layout([Point(+1, 0), Point(-1, 0)], EPS, ROWS, SEED, STEP)
    found = forward.evaluate_batched(lambda: module(x[stack.source]), stack)
    assert agree(found[stack.losses[0]], expected, dtype)
    assert agree(found[stack.losses[1]], whole(forward, module, x, -EPS), dtype)


@examples
def test_a_state_dict_has_the_trained_weight_and_loads_anew(case):
    module, x = layer(case, torch.float32)
    forward = probe_of(module, "low rank")
    expected = module(x).detach()
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert any(isinstance(c, LowRankCoordinate) and c.uses_hook for c in forward.coordinates) == bool(forward.low_rank_hooks)
    twin, _ = layer(case, torch.float32)
    twin.load_state_dict(saved)
    assert agree(twin(x), expected, torch.float32)
    module.load_state_dict(saved)
    assert not any(c.pending for c in forward.coordinates if isinstance(c, LowRankCoordinate))
    assert agree(module(x), expected, torch.float32)
    forward.remove_hooks()


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.by_engine])
def test_a_rule_owns_the_layers_of_its_examples(name):
    rule = RULES[name]
    owned = [m for example in rule.examples() for m in example.build().modules() if rule_of(m) is rule]
    assert owned or type(rule).owns is LayerRule.owns, f"{name} owns nothing"
    for module in owned:
        layout = rule.layout(module)
        if layout is not None:
            rows, columns = module.weight.shape
            assert (layout.outputs, layout.inputs) == ((rows, columns) if layout.outputs_first else (columns, rows))


def test_lazy_weights_are_lent_where_rows_are_looked_up():
    module, _ = layer("Embedding: alone", torch.float32)
    for kind in ("full", "low rank"):
        forward = probe_of(module, kind)
        with torch.no_grad(), forward.at(Offset(EPS, SEED, STEP, 0), hooks=False):
            assert isinstance(module.weight, LazyWeight)
        forward.remove_hooks()


def test_two_layer_types_cannot_compute_one_function():
    class Other(LayerRule):
        batched = RULES["Linear"].batched

    with pytest.raises(ValueError, match="Other: linear is computed by another layer type already"):
        register(Other())
    assert "Other" not in RULES


def test_a_file_of_a_layer_type_knows_no_other_layer_type():
    folder = Path(zotune.forward.layers.__file__).parent
    types = {path.stem for path in folder.glob("*.py")} - {"__init__", "rule"}
    for stem in types:
        tree = ast.parse((folder / f"{stem}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {f"zotune.forward.layers.{other}" for other in types - {stem}}, stem


def test_coordinates_without_a_rule_go_the_general_way():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(70, 70, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight)

    module = Scale()
    assert rule_of(module) is None
    forward = probe_of(module, "low rank")
    coordinate: Coordinate = forward.coordinates[0]
    assert isinstance(coordinate, LowRankCoordinate) and not coordinate.uses_hook and not forward.low_rank_hooks
    x = torch.ones(2, 70)
    assert agree(forward.evaluate(lambda: module(x), Offset(EPS, SEED, STEP, 0)), whole(forward, module, x, EPS), torch.float32)
