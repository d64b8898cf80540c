"""Subspaces beyond full and low rank: their equations against plain arithmetic on small matrices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import toys
from zotune import ZerothOrder, methods, replay
from zotune.optim import journal_events
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.optim.state import StepContext
from zotune.rng.directions import Directions, Key
from zotune.subspaces import Activation, Blocks, Full, LowRank, Sparse
from zotune.subspaces.blockwise import blocks_of
from zotune.subspaces.coordinate import Offset
from zotune.subspaces.gradient_span import leading
from zotune.subspaces.projected import orthonormal
from zotune.subspaces.rank_one import GAUSSIAN, RankOneDirections
from zotune.weights.structure import repeated_layers
from zotune.weights.trainable_scales import TrainableScaleLinear, quantize


def matrix(rows: int = 7, columns: int = 6) -> nn.Linear:
    model = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    return model


#: Methods whose update is plain SGD along the direction that was evaluated, in a matrix of 7 × 6.
PLAIN = {
    "lozo": {"rank": 2, "interval": 4},
    "agzo": {"rank": 2, "interval": 4},
    "subzero": {"rank": 3, "interval": 4},
    "p-gap": {"rank": 3, "interval": 4, "probes": 2},
    "tezo": {"rank": 3},
    "conmezo": {"beta": 0.5, "warm_up": 4},
    "hizoo": {"smoothing": 0.05},
    "hizoo-l": {"smoothing": 0.05},
    "zo-sparse": {"density": 0.5, "interval": 4},
    "sparse-mezo": {"density": 0.5},
    "sensitive-mezo": {"density": 0.3},
    "zo-block": {},
    "zo-block-jacobi": {},
}


@pytest.mark.parametrize("forward_batching", ["sequential", "auto"])
@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_the_update_is_along_the_evaluated_direction_at_redraws(name, num_directions, forward_batching):
    """ΔW = −η s (1/K) Σ c_k (W₊ − W₋) / 2ε with the weights that the evaluations computed with, s = 1 or 1/r."""
    model, eps, lr = matrix(), 1e-2, 1e-2
    method = methods.get(name, eps=eps, num_directions=num_directions, **PLAIN[name])
    seen: dict[int, list[torch.Tensor]] = {}
    optimizer = ZerothOrder(model, method, lr=lr, forward_batching=forward_batching)
    (coordinate,) = optimizer.forward.coordinates
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for step in range(9):
        before = model.state_dict()["weight"].clone()
        optimizer.preparation.observe(StepContext(optimizer.seed, step, lambda x: model(x).square().mean(dim=1), [x]))
        optimizer.updater.begin(step)
        for k in range(num_directions):
            seen[k] = [optimizer.forward.evaluate(lambda: model(torch.eye(6)).T.clone(), Offset(s * eps, 0, step, k)) for s in (1, -1)]
        optimizer.step(lambda x: model(x).square().mean(dim=1), x)
        expected = before.clone()
        for k, c in enumerate(optimizer.last_report.coefficients.tolist()):
            expected -= lr * coordinate.lr_scale * c / num_directions * (seen[k][0] - seen[k][1]) / (2 * eps)
            # and c is the difference of the losses there
            losses = [(x @ weight.T).square().mean() for weight in seen[k]]
            assert c == pytest.approx(float(losses[0] - losses[1]) / (2 * eps), rel=5e-3, abs=5e-4)
        assert torch.allclose(model.state_dict()["weight"], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["subzero", "p-gap", "tezo", "zo-muon", "agzo", "zo-act"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d"])
def test_batched_and_sequential_losses_are_equal(name, kind):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    build = {"linear": lambda: nn.Linear(6, 7), "embedding": lambda: nn.Embedding(9, 6), "conv1d": lambda: Conv1D(7, 6)}[kind]
    x = torch.randint(0, 9, (4, 3)) if kind == "embedding" else torch.randn(4, 3, 6)
    losses = {}
    start = build().state_dict()
    for forward_batching in ("batched", "sequential"):
        model = build()
        model.load_state_dict(start)
        optimizer = ZerothOrder(model, methods.get(name, rank=3, eps=1e-2, num_directions=2), lr=1e-2, forward_batching=forward_batching)
        losses[forward_batching] = [optimizer.step(lambda x, model=model: model(x).square().mean(dim=(1, 2)), x) for _ in range(4)]
        assert optimizer.evaluator.batched is (forward_batching == "batched")
        losses[forward_batching] += [optimizer.last_report.coefficients]
    for a, b in zip(losses["batched"], losses["sequential"], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


# -- projected ---------------------------------------------------------------------------------------------------------------------------


def test_bases_are_orthonormal_and_as_large_as_declared():
    optimizer = ZerothOrder(matrix(), methods.subzero(rank=3), lr=0.0)
    (coordinate,) = optimizer.forward.coordinates
    coordinate.begin_step(0, 0)
    sigma = math.sqrt(7 * 6) / 3
    assert torch.allclose(coordinate.p.T @ coordinate.p, sigma**2 * torch.eye(3), atol=1e-5)
    assert torch.allclose(coordinate.v.T @ coordinate.v, torch.eye(3), atol=1e-6)
    core = torch.randn(2000, 3, 3, generator=torch.Generator().manual_seed(0))
    sizes = (coordinate.expand(core) @ coordinate.v.T).square().sum(dim=(1, 2))
    assert float(sizes.mean()) == pytest.approx(42, rel=0.05)  # a Gaussian direction's, mn


def test_orthonormal_bases_are_uniform():
    """E[Q Qᵀ] = r/n I, and E[Q] = 0, which the raw signs of QR would not give."""
    draws = [orthonormal(Directions("gaussian").draw(Key(0, k, 0, "w"), (5, 2))) for k in range(2000)]
    stacked = torch.stack(draws)
    assert torch.allclose((stacked @ stacked.mT).mean(dim=0), 0.4 * torch.eye(5), atol=0.03)
    assert float(stacked.mean(dim=0).abs().max()) < 5 * math.sqrt(0.2 / 2000)


def test_subzero_carries_momentum_over_a_redraw():
    """M ← P_newᵀ P_old M Q_oldᵀ Q_new: the same matrix, seen from the new bases."""
    method = methods.subzero(rank=5, interval=3, update_rule="SGD", update_rule_args={"momentum": 0.9})
    model = nn.Linear(6, 6, bias=False)
    optimizer = ZerothOrder(model, method, lr=1e-2)
    (coordinate,) = optimizer.forward.coordinates
    for _ in range(3):
        optimizer.step(lambda x: model(x).square().mean(dim=1), torch.eye(6))
    p, q, m = coordinate.p.clone(), coordinate.v.clone(), optimizer.rule.state()[0]["weight/momentum_buffer"].clone()
    optimizer.updater.begin(3)
    new = optimizer.rule.state()[0]["weight/momentum_buffer"]
    left, right = coordinate.p / coordinate.sigma, coordinate.v
    whole = p / coordinate.sigma @ m @ q.T
    assert torch.allclose(left @ new @ right.T, left @ left.T @ whole @ right @ right.T, atol=1e-5)


def test_zo_muon_moves_by_orthogonal_factors():
    """W moves by P u with singular values of about η on the matrix, and a vector by a step of length η."""
    model = nn.Linear(8, 9)
    optimizer = ZerothOrder(model, methods.zo_muon(rank=3), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step(lambda x: model(x).square().mean(dim=1), torch.eye(8))
    change = {name: value - before[name] for name, value in model.state_dict().items()}
    values = torch.linalg.svdvals(change["weight"])
    assert bool((values[:3] > 0.5e-2).all() and (values[:3] < 1.3e-2).all()) and float(values[3:].max()) < 1e-6
    assert float(change["bias"].norm()) == pytest.approx(1e-2, rel=1e-4)


# -- ConMeZO -----------------------------------------------------------------------------------------------------------------------------


def test_conmezo_draws_in_a_cone_around_its_momentum(tmp_path):
    """Z = cos φ √d m/‖m‖ + sin φ u, ‖m‖ of all weights together; m ← β m + (1 − β) c Z; replaying rebuilds m."""
    model, eps, lr, x = matrix(), 1e-2, 1e-2, torch.eye(6)
    model.bias = nn.Parameter(torch.linspace(-1, 1, 7))
    base = copy.deepcopy(model)
    method = methods.conmezo(angle=1.2, beta=0.9, warm_up=3, eps=eps)
    optimizer = ZerothOrder(model, method, lr=lr, journal=tmp_path / "j")
    shapes, cosine, sine = {"weight": (7, 6), "bias": (7,)}, math.cos(1.2), math.sin(1.2)
    m = {name: torch.zeros(shape) for name, shape in shapes.items()}
    loss_fn = lambda x: model(x).square().sum() / 2  # noqa: E731
    for step, beta in enumerate([0.1, None, None, 0.9, 0.9]):  # a third of the way up is past the flat tenth
        if beta is None:
            beta = 0.9 - 0.8 / (1 + 8 * ((step / 3 - 0.1) / 0.9) ** 1.8) ** 3
        size = math.sqrt(sum(float(each.square().sum()) for each in m.values()))
        z = {name: Directions("gaussian").draw(Key(0, step, 0, name), shape) for name, shape in shapes.items()}
        if size:
            z = {name: cosine * 7 * m[name] / size + sine * z[name] for name in shapes}
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = [((start["weight"] + s * z["weight"]).T + start["bias"] + s * z["bias"]).square().sum() / 2 for s in (eps, -eps)]
        optimizer.step(loss_fn, x)
        c = float(optimizer.last_report.coefficients)
        assert c == pytest.approx(float(losses[0] - losses[1]) / (2 * eps), rel=1e-3)
        m = {name: beta * m[name] + (1 - beta) * c * z[name] for name in shapes}
        assert all(torch.allclose(p, start[name] - lr * c * z[name], atol=1e-6) for name, p in model.named_parameters())
    assert all(torch.allclose(found.m, m[found.name].flatten(), atol=1e-6) for found in optimizer.forward.coordinates)
    again = replay(base, tmp_path / "j")
    assert all(torch.equal(a.m, b.m) for a, b in zip(again.forward.coordinates, optimizer.forward.coordinates, strict=True))


def test_conmezo_of_a_right_angle_is_mezo():
    found = []
    for method in (methods.mezo(), methods.conmezo(angle=math.pi / 2)):
        optimizer = ZerothOrder(model := matrix(), method, lr=1e-2)
        for _ in range(4):
            optimizer.step(lambda x, model=model: model(x).square().sum(), torch.eye(6))
        found.append(model.weight)
    assert torch.allclose(*found, atol=1e-5)


# -- LOREN -------------------------------------------------------------------------------------------------------------------------------


def log_density(a: torch.Tensor, z: torch.Tensor, damping: float) -> torch.Tensor:
    """log p(Z) of N(0, (I + ã ãᵀ / ρ)⁻¹), ã: a for every row of Z, but for a constant."""
    whole = a.repeat(len(z))
    precision = torch.eye(len(whole), dtype=a.dtype) + torch.outer(whole, whole) / damping
    return (precision.logdet() - z.flatten() @ precision @ z.flatten()) / 2


def test_directions_of_loren_have_the_covariance_of_a():
    """B Bᵀ = (I + ã ãᵀ / ρ)⁻¹ for Z = B u, in blocks, rows and whole."""
    a, keys = torch.tensor([0.5, -1.0, 2.0]), [Key(0, 0, k, "w") for k in range(200)]
    ours = RankOneDirections(GAUSSIAN, a, 12, damping=0.3)
    u = torch.stack([GAUSSIAN.draw(key, (12,)) for key in keys]).double()
    z = torch.stack([ours.draw(key, (4, 3)) for key in keys]).double().flatten(1)
    b, whole = torch.linalg.lstsq(u, z).solution, a.repeat(4).double()
    assert torch.allclose(b @ b.T, (torch.eye(12) + torch.outer(whole, whole) / 0.3).inverse(), atol=1e-5)
    assert torch.allclose(ours.draw_many(keys[2], 3, (4, 3)).double().flatten(1), z[2:5], atol=1e-6)
    assert torch.allclose(ours.rows(keys[5], torch.tensor([3, 1]), 3).double(), z[5].view(4, 3)[[3, 1]], atol=1e-6)
    part = ours.block(keys[7], slice(4, 11), torch.device("cpu"), 2.0)
    assert torch.allclose(part.double(), 2 * z[7, 4:11], atol=1e-6)


def test_loren_learns_its_covariance_and_moves_with_momentum(tmp_path):
    """The step of θ and, by autograd of log p, that of a; losses at θ + εZ alone."""
    model, eps, lr, rate, damping, k = matrix(), 1e-2, 1e-3, 1e-3, 0.5, 3
    method = methods.loren(damping=damping, covariance_lr=rate, momentum=0.5, eps=eps, num_directions=k)
    base, momentum = copy.deepcopy(model), torch.zeros(7, 6)
    optimizer = ZerothOrder(model, method, lr=lr, journal=tmp_path / "j")
    (coordinate,) = optimizer.forward.coordinates
    a = GAUSSIAN.draw(Key(0, 0, 0, "weight", "covariance"), (6,)).double()
    for step in range(3):
        start, whole = model.weight.detach().clone(), a.repeat(7)
        q = math.sqrt(damping + float(whole @ whole))
        u = [GAUSSIAN.draw(Key(0, step, j, "weight"), (7, 6)).double() for j in range(k)]
        z = [each - (whole @ each.flatten()) / (q * (q + math.sqrt(damping))) * whole.view(7, 6) for each in u]
        losses = torch.stack([(start + eps * each).square().sum() / 2 for each in z])
        c = (losses - losses.mean()) / eps * k / (k - 1)
        optimizer.step(lambda x: model(x).square().sum() / 2, torch.eye(6))
        assert optimizer.last_report.coefficients.tolist() == pytest.approx(c.tolist(), rel=1e-2, abs=1e-3)
        c = optimizer.last_report.coefficients.double()
        momentum = 0.5 * momentum + sum(weight * each for weight, each in zip(c, z, strict=True)) / k
        assert torch.allclose(model.weight.double(), start - lr * momentum, atol=1e-6)
        with torch.enable_grad():
            of = a.clone().requires_grad_()
            expected = sum(weight * log_density(of, each, damping) for weight, each in zip(c, z, strict=True)) / k
            a = a - rate * torch.autograd.grad(expected, of)[0]
        assert torch.allclose(coordinate.a.double(), a, atol=1e-5)
    again = replay(base, tmp_path / "j")
    assert torch.equal(again.forward.coordinates[0].a, coordinate.a) and torch.equal(base.weight, model.weight)


# -- HiZOO -------------------------------------------------------------------------------------------------------------------------------


def test_hizoo_learns_the_curvature_after_the_update(tmp_path):
    """H ← (1 − α) H + α q H ⊙ Z², and q = |l₊ + l₋ − 2l₀| / 2ε² is in the journal."""
    model = matrix()
    optimizer = ZerothOrder(model, methods.hizoo(smoothing=0.1, eps=1e-2), lr=1e-3, journal=tmp_path / "j")
    (coordinate,) = optimizer.forward.coordinates
    h = torch.ones(7, 6)
    x = torch.eye(6)
    for step in range(4):
        z = Directions("gaussian").draw(Key(0, step, 0, "weight"), (7, 6))
        weight, move = model.weight.detach().clone(), 1e-2 * z / h.sqrt()
        plus, minus, here = ((weight + s * move).square().sum() / 2 for s in (1, -1, 0))
        q = float((plus + minus - 2 * here).abs()) / (2 * 1e-4)
        optimizer.step(lambda x: model(x).square().sum() / 2, x)
        *_, record = (record for record in optimizer.journal.records() if isinstance(record, StepRecord))
        assert record.coefficients[1] == pytest.approx(q, rel=2e-2)
        h = 0.9 * h + 0.1 * record.coefficients[1] * h * z.square()
        assert torch.allclose(coordinate.h.view(7, 6), h, rtol=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_hizoo_may_renew_the_curvature_first(first, tmp_path):
    """θ ← θ − η c H^-½ Z, with the H of the evaluations, or (the published code) the renewed one."""
    model = matrix()
    optimizer = ZerothOrder(model, methods.hizoo(smoothing=0.3, eps=1e-2, renew_first=first), lr=1e-3, journal=tmp_path / "j")
    (coordinate,) = optimizer.forward.coordinates
    for step in range(2):
        weight, h = model.weight.detach().clone(), coordinate.h.clone()
        optimizer.step(lambda x: model(x).square().sum() / 2, torch.eye(6))
        z = Directions("gaussian").draw(Key(0, step, 0, "weight"), (7, 6))
        scale = (coordinate.h if first else h).view(7, 6).rsqrt()
        assert torch.allclose(model.weight, weight - 1e-3 * float(optimizer.last_report.coefficients) * z * scale, atol=1e-6)
    copy = matrix()
    replay(copy, tmp_path / "j")
    assert torch.equal(copy.weight, model.weight)


def test_hizoo_l_keeps_means_of_rows_and_columns():
    """H = r cᵀ / mean r; r and c take in the row and column means of q H ⊙ Z²."""
    model = matrix()
    optimizer = ZerothOrder(model, methods.hizoo_l(smoothing=0.1, eps=1e-2), lr=1e-3)
    (coordinate,) = optimizer.forward.coordinates
    r, c, x = torch.ones(7), torch.ones(6), torch.eye(6)
    for step in range(4):
        h = torch.outer(r, c) / r.mean()
        z = Directions("gaussian").draw(Key(0, step, 0, "weight"), (7, 6))
        weight, move = model.weight.detach().clone(), 1e-2 * z / h.sqrt()
        plus, minus, here = ((weight + s * move).square().sum() / 2 for s in (1, -1, 0))
        optimizer.step(lambda x: model(x).square().sum() / 2, x)
        q = float((plus + minus - 2 * here).abs()) / (2 * 1e-4)
        r, c = 0.9 * r + 0.1 * q * (h * z.square()).mean(1), 0.9 * c + 0.1 * q * (h * z.square()).mean(0)
        assert torch.allclose(coordinate.h, torch.cat([r, c]), rtol=3e-2)
    assert methods.hizoo_l().state_bytes([(700, 600)]) == 4 * 1300


# -- sparse ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_small_weights_are_those_that_move(dtype, density):
    model = matrix(40, 50).to(dtype)
    optimizer = ZerothOrder(model, methods.sparse_mezo(density=density, eps=1e-3), lr=1e-4)
    (coordinate,) = optimizer.forward.coordinates
    start = model.weight.detach().clone()
    small = start.float().abs() <= coordinate.threshold
    assert float(small.float().mean()) == pytest.approx(density, abs=0.01)
    optimizer.step(lambda x: model(x).float().square().mean(dim=1), torch.eye(50, dtype=dtype))
    moved = coordinate.value() != start.float()
    assert not bool((moved & ~small).any()) and float(moved[small].float().mean()) > 0.9


def test_random_masks_have_their_density_and_change_when_due():
    model = matrix(60, 50)
    optimizer = ZerothOrder(model, methods.zo_sparse(density=0.3, interval=3), lr=0.0)
    (coordinate,) = optimizer.forward.coordinates
    masks = [coordinate.factors(0, step)(slice(0, 3000)).float() for step in range(6)]
    assert all(torch.equal(masks[0], mask) for mask in masks[1:3]) and torch.equal(masks[3], masks[5])
    assert float((masks[0] != masks[3]).float().mean()) == pytest.approx(2 * 0.3 * 0.7, abs=0.05)
    assert abs(float(masks[0].mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 3000)
    # and blocks are parts of the whole
    assert torch.equal(coordinate.factors(0, 0)(slice(101, 999)).float(), masks[0][101:999])


def test_global_magnitude_gives_large_layers_their_share():
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    generator = torch.Generator().manual_seed(0)
    for layer, size in zip(model, (0.1, 1.0), strict=True):
        nn.init.normal_(layer.weight, std=size, generator=generator)
    optimizer = ZerothOrder(model, methods.zo_sparse(density=0.4, layers="magnitude"), lr=0.0)
    magnitudes = torch.cat([layer.weight.detach().abs().flatten() for layer in model])
    threshold = magnitudes.sort().values[int(0.6 * 5000)]
    for coordinate, layer in zip(optimizer.forward.coordinates, model, strict=True):
        assert coordinate.share == pytest.approx(float((layer.weight.abs() > threshold).float().mean()), abs=0.01)


def test_sensitive_weights_have_the_largest_squared_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

    def losses(x):
        return (model(x) - 0.5).square().mean(dim=1)

    squares = [torch.zeros_like(p) for p in model.parameters()]
    for one in x:
        for square, grad in zip(squares, torch.autograd.grad(losses(one[None]).sum(), list(model.parameters())), strict=True):
            square += grad.square()
    optimizer = ZerothOrder(model, methods.sensitive_mezo(density=0.25), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.step(losses, x)
    assert all(p.grad is None for p in model.parameters())
    for p, old, square in zip(model.parameters(), before, squares, strict=True):
        if p.dim() == 2:
            expected = square.flatten().sort(descending=True).indices[: round(0.25 * p.numel())].sort().values
            assert torch.equal((p.detach() != old).flatten().nonzero().flatten(), expected)
        else:
            assert bool((p.detach() != old).all())


def test_forward_passes_find_the_weights_that_carry_the_gradient(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(20, 10, bias=False)
    strong = torch.zeros(10, 20)
    strong[1, 3], strong[7, 0], strong[9, 19] = 2.0, -3.0, 2.5
    base = {name: p.detach().clone() for name, p in model.named_parameters()}

    def losses(x):  # examples whose gradients have those three weights in common; none can be differentiated
        weight = model(torch.eye(20)).T
        return ((weight * strong).sum() * (1 + 0.1 * x[:, 0]) + 1e-3 * weight.sum()).detach()

    method = methods.sensitive_mezo(density=3 / 200, mask_directions=128)
    optimizer = ZerothOrder(model, method, lr=1e-2, journal=tmp_path / "j", forward_batching="sequential")
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.step(losses, x)
    moved = (model.weight.detach() != base["weight"]).nonzero().tolist()
    assert moved == strong.nonzero().tolist()
    # θ itself is looked at by nothing here: 2 forwards a direction, then those of the steps.
    assert optimizer.forward_passes == 2 * 128 + 2 * 2
    assert optimizer.sequences_evaluated == 5 * optimizer.forward_passes
    again = nn.Linear(20, 10, bias=False)
    again.load_state_dict(base)
    replay(again, tmp_path / "j", method=method)
    assert torch.equal(again.weight, model.weight)


def test_a_loss_without_a_gradient_has_no_sensitive_weights():
    model = matrix()
    optimizer = ZerothOrder(model, "sensitive-mezo", lr=1e-2)
    with pytest.raises(ValueError, match="needs backward passes in the first step"):
        optimizer.step(lambda x: model(x).detach().square().mean(dim=1), torch.eye(6))


# -- blocks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "layers"), [("llama", 2), ("opt", 2), ("gpt2", 2), ("bert", 2)])
def test_the_layers_of_a_transformer_are_its_blocks(architecture, layers):
    model = toys.transformer(architecture)
    assert len(repeated_layers(model)) == layers
    coordinates = [Full().coordinate(name, p) for name, p in model.named_parameters()]
    blocks = blocks_of(model, coordinates, "layer")
    assert len(blocks) == layers + 1
    assert sorted(c.name for block in blocks for c in block) == sorted(c.name for c in coordinates)
    for place in range(layers):
        assert all(f".{place}." in c.name for c in blocks[place])


@pytest.mark.parametrize("order", ["gauss-seidel", "jacobi"])
def test_only_the_block_whose_turn_it_is_moves(order):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    name = {"gauss-seidel": "zo-block", "jacobi": "zo-block-jacobi"}[order]
    optimizer = ZerothOrder(model, methods.get(name, eps=1e-2), lr=1e-2)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def losses(x):
        return (model(x) - 0.5).square().mean(dim=1)

    for step in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step(losses, x)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        if order == "gauss-seidel":
            assert moved == {f"{2 * (step % 2)}.weight", f"{2 * (step % 2)}.bias"}
            continue
        assert moved == set(before) and len(optimizer.last_report.coefficients) == 2
        for block, c in enumerate(optimizer.last_report.coefficients.tolist()):  # each by its own difference, the other at rest
            names = [f"{2 * block}.weight", f"{2 * block}.bias"]
            z = {n: Directions("gaussian").draw(Key(0, step, block, n), before[n].shape) for n in names}
            found = []
            for sign in (1, -1):
                there = {n: p + sign * 1e-2 * z[n] if n in z else p for n, p in before.items()}
                found.append(float((torch.func.functional_call(model, there, (x,)) - 0.5).square().mean()))
            assert c == pytest.approx((found[0] - found[1]) / 2e-2, rel=1e-3, abs=1e-4)
            for n in names:
                assert torch.allclose(model.get_parameter(n), before[n] - 1e-2 * c * z[n], atol=1e-6)


def test_blocks_of_adapters_are_evaluated_in_one_forward():
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for model, forward_batching in zip(models, ("batched", "sequential"), strict=True):
        optimizer = ZerothOrder(model, methods.zo_block_jacobi(num_directions=2), lr=1e-2, forward_batching=forward_batching)
        optimizer.step(lambda x, model=model: model(x).square().mean(dim=1), x)
        found.append(optimizer.last_report.coefficients)
    assert len(found[0]) == 4 and torch.allclose(*found, rtol=1e-3, atol=1e-3)


# -- V from inputs -----------------------------------------------------------------------------------------------------------------------


def leading_inputs(parts, rank):
    """√n times the leading right singular vectors of the inputs (rows, 30) of all parts."""
    model = nn.Linear(30, 31)
    subspace = Activation(rank, 5)
    return subspace.observe(model, [subspace.coordinate("weight", model.weight)], lambda: (model(x).mean() for x in parts), 0, 0)[
        "weight"
    ].float()


@pytest.mark.parametrize("rows", [3, 200])
def test_v_spans_the_inputs_leading_subspace(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 30, generator=generator) @ torch.diag(0.7 ** torch.arange(30.0)) @ torch.randn(30, 30, generator=generator)
    v = leading_inputs([x], 2) / math.sqrt(30)
    leading = torch.linalg.svd(x)[2][:2].T
    assert torch.allclose(v.T @ v, torch.eye(2), atol=2e-2)
    assert torch.allclose(v @ v.T, leading @ leading.T, atol=2e-2)


def test_v_of_micro_batches_is_that_of_the_batch():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(30)
    whole, found = leading_inputs([x], 3), leading_inputs(x.split(15), 3)
    assert torch.allclose(found @ found.T, whole @ whole.T, atol=0.3)  # of numbers up to 30, in bfloat16


def test_zo_act_is_adam_in_the_span_of_the_first_inputs():
    model, eps, lr = matrix(), 1e-2, 1e-2
    start, core = model.weight.detach().clone(), nn.Parameter(torch.zeros(7, 2))
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) * 0.5 ** torch.arange(6)
    v = torch.linalg.svd(x)[2][:2].T
    v = (v * v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()).bfloat16().float()
    adam = torch.optim.Adam([core], lr=lr)
    optimizer = ZerothOrder(model, methods.zo_act(rank=2, eps=eps), lr=lr)
    for step in range(4):
        inputs = x.flip(1) if step else x  # later ones do not change V
        z = Directions("gaussian").draw(Key(0, step, 0, "weight"), (7, 2))
        losses = [((start + (core.detach() + scale * z) @ v.T) @ inputs.T).square().mean() for scale in (eps, 0.0)]
        core.grad = (losses[0] - losses[1]) / eps * z
        adam.step()
        optimizer.step(lambda x: model(x).square().mean(dim=1), inputs)
    assert torch.allclose(model.state_dict()["weight"], start + core.detach() @ v.T, atol=1e-4)


def test_p_gap_is_its_equation_in_the_span_of_its_probes():
    """Two redraws of a matrix, from losses evaluated by hand; δ falls to 0 in the eighth step."""
    model, eps, lr, sigma = matrix(), 1e-2, 1e-2, math.sqrt(7 * 6) / 2
    weight, x = model.weight.detach().clone(), torch.linspace(-1, 2, 24).view(4, 6)
    method = methods.p_gap(rank=2, interval=3, probes=2, delta=4.0, delta_steps=8, eps=eps)
    optimizer, gaussian = ZerothOrder(model, method, lr=lr), Directions("gaussian")

    def slope(move: torch.Tensor, size: float) -> float:
        high, low = ((x @ (weight + sign * size * move).T).square().mean().double() for sign in (1, -1))
        return float(high - low) / (2 * size)

    for step in range(5):
        if step % 3 == 0:
            z = [gaussian.draw(Key(0, step // 3, j, "weight", "probe"), (7, 6)) for j in range(2)]
            p, sizes, q = torch.linalg.svd(sum(slope(each, 1e-3) * each for each in z))
            p, sizes, q = p[:, :2], sizes[:2], q[:2].T
            signs = p.gather(0, p.abs().argmax(dim=0, keepdim=True)).sign()
            p, q, axis = p * signs, q * signs, torch.diag(sizes / sizes.norm())
        drawn = gaussian.draw(Key(0, step, 0, "weight"), (2, 2))
        (coordinate,) = optimizer.forward.coordinates
        optimizer.step(lambda x: model(x).square().mean(dim=1), x)
        found = coordinate.draw(optimizer.directions, 0, step, 0, 1)[0]
        along = float((found * axis).sum())
        assert along**2 == pytest.approx(4 - step / 2, rel=1e-3)
        z = drawn - ((axis * drawn).sum() - along) * axis
        assert torch.allclose(found, z, atol=1e-3)
        move = sigma * p @ z @ q.T
        weight -= lr * slope(move, eps) * move
        assert torch.allclose(model.state_dict()["weight"], weight, atol=1e-3)
    assert {coordinate.draw(optimizer.directions, 0, 0, k, 1)[0].mul(axis).sum().sign().item() for k in range(8)} == {1.0, -1.0}


def test_leading_singular_vectors_of_a_stack():
    a = torch.randn(3, 60, 40, generator=torch.Generator().manual_seed(0)) * 0.5 ** torch.arange(40)
    p, sizes, q = leading(a, 4, torch.randn(3, 40, 20, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(p * sizes.unsqueeze(-2) @ q.mT, a, atol=0.3)
    assert torch.allclose(sizes, torch.linalg.svdvals(a)[:, :4], rtol=1e-4)
    assert torch.allclose(p.mT @ p, torch.eye(4).expand(3, 4, 4), atol=1e-5) and torch.allclose(a @ q, p * sizes.unsqueeze(-2), atol=1e-3)


def test_what_was_observed_is_in_the_journal_and_comes_back(tmp_path):
    tensors = {"a": torch.randn(300, 90).bfloat16(), "b": torch.arange(7, dtype=torch.int32), "c": torch.randn(9000, 4).bfloat16()}
    journal = Journal.create(tmp_path / "j", {"seed": 0})
    for event in journal_events.events(3, tensors):
        journal.append(event)
    assert len(list(journal.records())) > 2
    assembler, found = journal_events.TensorAssembler({name: tensor.numel() for name, tensor in tensors.items()}), {}
    for event in Journal.open(tmp_path / "j").records():
        found |= assembler.add(event)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


# -- forward mode ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_forward_grad_is_the_directional_derivative(architecture):
    model = toys.transformer(architecture).eval()
    losses, ids = toys.transformer_loss(model), toys.tokens()
    losses(ids).mean().backward()
    expected = sum(float((p.grad * Directions("gaussian").draw(Key(0, 0, 0, name), p.shape)).sum()) for name, p in model.named_parameters())
    for p in model.parameters():
        p.grad = None
    optimizer = ZerothOrder(model, "forward-grad", lr=0.0)
    with pytest.warns(UserWarning, match="attention kernel has no forward derivative"):
        optimizer.step(losses, ids)
    assert float(optimizer.last_report.coefficients) == pytest.approx(expected, rel=1e-3)
    optimizer.step(losses, ids)  # says it once
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out: out.detach().square().mean(), "the loss has no derivative"),
        (lambda out: torch.as_tensor(out.square().mean().item()), "the loss has no derivative"),
    ],
)
def test_a_loss_that_is_cut_off_has_no_derivative(loss, message):
    model = matrix()
    before = model.weight.detach().clone()
    optimizer = ZerothOrder(model, "forward-grad", lr=1e-2)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda x: loss(model(x)), torch.eye(6))
    assert torch.equal(model.weight, before)


# -- options -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.subzero(rank=0), "rank must be a whole number"),
        (lambda: methods.p_gap(probes=0), "probes must be a whole number"),
        (lambda: methods.p_gap(delta=-1.0), "delta must be a number of at least 0"),
        (lambda: methods.p_gap(delta_steps=1.5), "delta_steps must be a whole number"),
        (lambda: methods.tezo(rank=0), "rank must be a whole number"),
        (lambda: methods.zo_sparse(density=0), "density must lie in"),
        (lambda: methods.sensitive_mezo(density=2), "density must lie in"),
        (lambda: methods.sensitive_mezo(mask_directions=-1), "mask_directions must be a whole number"),
        (lambda: methods.zo_sparse(layers="none"), "layers must be 'uniform' or 'magnitude'"),
        (lambda: methods.zo_block(unit="row"), "unknown unit of blocks 'row'; choose one of layer, linear"),
        (lambda: methods.hizoo(smoothing=1.0), "smoothing must lie in"),
        (lambda: methods.conmezo(angle=2.0), "angle must lie in"),
        (lambda: methods.loren(damping=0.0), "damping must be a positive number"),
        (lambda: methods.loren(covariance_lr=-1.0), "covariance_lr must be a number of at least 0"),
        (lambda: methods.conmezo(beta=1.0), "beta must lie in"),
        (lambda: methods.conmezo(warm_up=-1), "warm_up must be a whole number of at least 0"),
        (lambda: methods.mezo(estimator="curvature"), "take method 'hizoo'"),
        (lambda: methods.lozo(estimator="tangent"), "take method 'forward-grad'"),
        (lambda: methods.hizoo(directions_per="example"), "method 'hizoo' has no option 'directions_per'"),
        (lambda: Sparse(choice="large"), "unknown choice of a mask"),
        (lambda: Blocks(order="random"), "unknown order of blocks"),
        (lambda: LowRank(interval=0), "interval must be a whole number"),
    ],
)
def test_bad_options_get_one_sentence_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- scales of quantized weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_of_a_quantised_model_the_scales_move_and_nothing_else(architecture):
    model = toys.transformer(architecture).eval()
    losses, ids = toys.transformer_loss(model), toys.tokens()
    exact = losses(ids).detach()
    quantize(model)
    assert torch.allclose(losses(ids), exact, rtol=2e-2)
    optimizer = ZerothOrder(model, methods.mezo(num_directions=2), lr=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        optimizer.step(losses, ids)
    assert optimizer.evaluator.batched
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved == {name for name in before if name.endswith(".scale")}


@torch.no_grad()
def test_a_quantised_layer_is_its_rounded_weight():
    linear = nn.Linear(6, 5)
    layer, x = TrainableScaleLinear(linear), torch.randn(4, 6)
    weight = layer.quantized.float() * layer.scale.unsqueeze(1)
    assert float((weight - linear.weight).abs().max()) <= 0.5001 * float(layer.scale.max())
    assert torch.allclose(layer(x), x @ weight.T + linear.bias, atol=1e-6)


def test_a_model_without_linear_layers_is_not_quantised():
    with pytest.raises(ValueError, match="no Linear layer"):
        quantize(nn.LayerNorm(4))
