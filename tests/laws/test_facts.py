"""What is known of zeroth-order steps from theory, held against this library's own steps and directions."""

import math

import pytest
import torch
from torch import nn

from zotune import ZerothOrder, methods
from zotune.methods.coefficients import ByDeviation
from zotune.rng.directions import Directions, Key

CPU = torch.device("cpu")


class Point(nn.Module):
    """One parameter θ."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self) -> torch.Tensor:
        return self.theta


def gaussians(rows: int, columns: int, step: int = 0) -> torch.Tensor:
    return Directions("gaussian").draw(Key(0, step, 0, "theta"), (rows, columns), CPU).double()


def test_the_smoothing_bias_is_below_its_bound():
    """f = Σ sin θ_i has ∇f_ε = e^(−ε²/2) cos θ, and ‖∇f_ε − ∇f‖ ≤ (ε/2) L (d+3)^(3/2), L = 1."""
    draws, eps = 200_000, 0.8
    theta = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    z = gaussians(draws, 4)
    c = ((theta + eps * z).sin().sum(dim=1) - (theta - eps * z).sin().sum(dim=1)) / (2 * eps)
    estimates = c.unsqueeze(1) * z
    error = 5 * estimates.std(dim=0) / draws**0.5
    smoothed = math.exp(-(eps**2) / 2) * theta.cos()
    assert bool(((estimates.mean(dim=0) - smoothed).abs() < error).all())
    assert (estimates.mean(dim=0) - theta.cos()).abs().max() > error.max()  # the bias is there to be seen
    assert (estimates.mean(dim=0) - theta.cos()).norm() < eps / 2 * 7**1.5


def steps_to(share: float, size: int, seed: int) -> int:
    """Steps of MeZO until ½ Σ θ_i² / i², from ones, is below that share of its start."""
    curvature = torch.arange(1, size + 1).float().square().reciprocal()
    model = Point(torch.ones(size))
    optimizer = ZerothOrder(model, methods.mezo(eps=1e-2), lr=0.1, seed=seed)
    start = 0.5 * float(curvature.sum())
    for step in range(1, 1000):
        optimizer.step(lambda: 0.5 * (curvature * model().square()).sum())
        if 0.5 * float((curvature * model.theta.detach().square()).sum()) < share * start:
            return step
    raise AssertionError("the target was not reached")


def test_steps_follow_the_effective_rank_and_not_the_dimension():
    """MeZO's theorem 1: curvatures 1/i² have tr(H) / ‖H‖ < π²/6 in any dimension, and one rate serves all."""
    few, many = (sum(steps_to(0.3, size, seed) for seed in range(6)) for size in (10, 2000))
    assert many < 2 * few


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_one_gaussian_direction_is_stable_up_to_its_limit(share):
    """θ ← θ − η z zᵀ H θ: E θ_i² ← (1 − 2ηλ_i + 2η²λ_i²) E θ_i² + η² Σ_j λ_j² E θ_j², stable iff Σ ηλ_i / (1 − ηλ_i) < 2."""
    curvature = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)

    def total(rate: float) -> float:
        return float((rate * curvature / (1 - rate * curvature)).sum())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < 2 else (low, middle)
    rate = share * low
    moment = torch.diag(1 - 2 * rate * curvature + 2 * (rate * curvature) ** 2) + rate**2 * curvature.square().expand(4, 4)
    # The moments after one step are those of this library's directions.
    theta, draws = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64), 200_000
    z = gaussians(draws, 4, step=1)
    after = (theta - rate * z * (z @ (curvature * theta)).unsqueeze(1)).square()
    assert bool(((after.mean(dim=0) - moment @ theta.square()).abs() < 5 * after.std(dim=0) / draws**0.5).all())
    assert (torch.linalg.eigvals(moment).abs().max() < 1) == (share < 1)


def test_fzoos_few_losses_make_its_steps_longer():
    """Normal losses: the mean of Σ (c / σ̂)² / K over that at the true σ is (K − 1)(K − 2) / K(K − 3)."""
    draws = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    squares = [sum(c * c for c in ByDeviation().shape(row, [False] * 8, 1.0, {})) / 8 for row in draws.tolist()]
    found = torch.tensor(squares)
    assert abs(float(found.mean()) - 7 * 6 / (8 * 5)) < 5 * float(found.std()) / len(squares) ** 0.5


@pytest.mark.parametrize(("unit", "eps"), [(1.0, 1e-2), (100.0, 1e-2), (1.0, 1e-1)])
def test_fzoos_step_is_normalised_and_carries_one_over_eps(unit, eps):
    """σ ≈ ε‖∇L‖ for signs, and E‖mean c_k Z_k‖² = ‖∇L‖² (d + K − 1) / K: the step is η/ε √((d + K − 1) / K) long."""
    size, count, rate = 64, 256, 1e-4
    slope = unit * torch.linspace(-1, 1, size)
    model = Point(torch.zeros(size))
    ZerothOrder(model, methods.fzoo(eps=eps, num_directions=count), lr=rate).step(lambda: model() @ slope)
    expected = rate / eps * ((size + count - 1) / count) ** 0.5
    assert float(model.theta.detach().norm()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "drifts"),
    [
        (torch.bfloat16, {1: 4e-3, 100: 3.9e-2, 1000: 0.12}),
        (torch.float16, {1: 5e-4, 100: 5e-3, 1000: 1.6e-2}),
        (torch.float32, {1000: 2e-6}),
    ],
)
def test_perturbing_in_place_drifts_and_probing_does_not(dtype, drifts):
    """+ε, −2ε, +ε on weights of deviation 0.02 at ε = 1e-3: 12 % of their length gone after 1,000 steps in bfloat16, without any update."""
    start = (0.02 * gaussians(128, 128, step=2)).to(dtype)
    weight = start.clone()
    for step in range(1000):
        z = gaussians(128, 128, step=3 + step).to(dtype)
        for factor in (+1e-3, -2e-3, +1e-3):
            weight.add_(z, alpha=factor)
        if step + 1 in drifts:
            drift = float((weight.double() - start.double()).norm() / start.double().norm())
            assert drift == pytest.approx(drifts[step + 1], rel=0.1)
    model = Point(start)
    optimizer = ZerothOrder(model, methods.mezo(eps=1e-3), lr=0.0)
    for _ in range(20):
        optimizer.step(lambda: model().float().square().sum())
    assert torch.equal(model.theta, start)
