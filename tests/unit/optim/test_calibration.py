"""``auto``: ε and η from losses; each measurement is what its equation says, and what is chosen learns."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import toys
from zotune import NonFiniteLossError, ZerothOrder, methods, replay
from zotune.methods.coefficients import FITNESS
from zotune.methods.estimators import ESTIMATORS
from zotune.methods.rules import Rule
from zotune.optim.calibration.calibrator import INTERVAL, WIDEST
from zotune.optim.calibration.eps import LADDER, choose_eps
from zotune.optim.calibration.gains import gain, measurable, rule_gain
from zotune.optim.calibration.running_mean import RunningMean
from zotune.optim.calibration.step_size import CAUTION, LEAP, NOISE_SCALE, REACH, WIDER, StepSize, agreement, in_units

AUTO = {"eps": "auto"}
#: Methods whose rate can be measured.
MEASURABLE = [name for name in toys.names() if measurable(methods.get(name))]


def run(model: nn.Module, optimizer: ZerothOrder, first: int, last: int) -> list[float]:
    return [float(optimizer.step(toys.loss_function(model), toys.batch(seed=step))) for step in range(first, last)]


# -- ε ----------------------------------------------------------------------------------------------------------------------------------


def line(noise: float, cubic: float, quadratic: float = 0.0):
    """Losses of 50 examples along directions: linear, with bends, and rounded to multiples of ``noise``."""

    def at(scale: float, direction: int) -> torch.Tensor:
        slope = torch.linspace(1, 2, 50).double() + direction % 7
        exact = slope * scale + quadratic * slope * scale**2 + cubic * slope * scale**3
        return exact if not noise else (exact / noise).round() * noise

    return at


def test_a_straight_loss_takes_the_largest_eps():
    assert choose_eps(line(0.0, 0.0), ESTIMATORS["central"]) == LADDER[-1]


def test_eps_stays_below_where_the_loss_bends():
    """Neighbors differ by cubic · (ε'² − ε²): 3% of the slope at ε' ≈ 0.01 for a cubic coefficient of 300."""
    assert choose_eps(line(0.0, 300.0), ESTIMATORS["central"]) == 0.01
    assert choose_eps(line(0.0, 30_000.0), ESTIMATORS["central"]) == 1e-3


def test_eps_stays_above_rounding():
    assert choose_eps(line(1e-2, 0.1), ESTIMATORS["central"]) == 0.1


def test_only_a_forward_difference_is_biased_by_curvature():
    assert choose_eps(line(0.0, 0.0, quadratic=10.0), ESTIMATORS["central"]) == LADDER[-1]
    assert choose_eps(line(0.0, 0.0, quadratic=10.0), ESTIMATORS["forward"]) <= 3e-3


def test_a_loss_that_does_not_move_takes_the_largest_eps():
    assert choose_eps(lambda scale, direction: torch.ones(3), ESTIMATORS["central"]) == LADDER[-1]


def test_a_loss_that_is_nowhere_finite_gives_no_eps():
    with pytest.raises(NonFiniteLossError, match="no eps can be chosen"):
        choose_eps(lambda scale, direction: torch.full((3,), math.nan), ESTIMATORS["central"])


# -- what η is made of --------------------------------------------------------------------------------------------------------------------


def quadratic_losses(z: torch.Tensor, gradients: torch.Tensor, diagonal: torch.Tensor, eps: float) -> torch.Tensor:
    """Losses (3, n) of ℓ_b(w) = ½ wᵀHw + g_bᵀw at 0, εz_b and −εz_b, for z (n, d) or (d,)."""
    bend, slope = 0.5 * eps**2 * (z.square() * diagonal).sum(-1), eps * (gradients * z).sum(-1)
    return torch.stack([torch.zeros(len(gradients)), bend + slope, bend - slope])


def forgetful() -> StepSize:
    """One that does not forget at all."""
    return StepSize(**{name: RunningMean(1e-9) for name in ("curvature", "spread", "agreement", "single", "moment")})


@pytest.mark.parametrize("own", [False, True])
def test_measuring_finds_trace_norm_and_signal(own):
    """g_b = g + n_b: E[ZᵀHZ] = tr H, E[(ZᵀHZ)²] = (tr H)² + 2 ‖H‖_F², and s / M is ‖g‖² over E[c²] of a step's coefficient."""
    generator = torch.Generator().manual_seed(0)
    diagonal, g, noise, eps = torch.linspace(0.1, 3, 20), torch.full((20,), 0.3), 0.8, 1e-2
    measured = forgetful()
    owners = torch.arange(16) // 4 if own else None
    for _ in range(1500):
        shared = torch.randn(20, generator=generator)
        z = torch.randn(4, 20, generator=generator).repeat_interleave(4, dim=0) if own else shared
        gradients = g + noise * torch.randn(16, 20, generator=generator)
        measured.record_losses(quadratic_losses(z, gradients, diagonal, eps), eps, owners)
        if own:  # halves of a direction's examples, and parts of as many examples under one direction
            halves = in_units(((gradients * z).sum(-1)).double().unsqueeze(0), owners)
            measured.compare(halves, in_units(((gradients * shared).sum(-1)).double().unsqueeze(0), number=8))
    assert measured.curvature.mean == pytest.approx(float(diagonal.sum()), rel=0.05)
    norm = math.sqrt((measured.spread.mean - measured.curvature.mean**2) / 2)
    assert norm == pytest.approx(float(diagonal.norm()), rel=0.15)
    s, averaged = float(g.square().sum()), 2 if own else 16  # examples behind one of a step's coefficients
    # along one direction the signal is much or nothing, and a mean of such ratios is too small, if anything
    assert measured.signal == pytest.approx(s / (s + 20 * noise**2 / averaged), rel=0.2 if own else 0.1)


def test_agreement_is_the_correlation_of_units():
    assert agreement(torch.ones(3, 4)) == pytest.approx(1 + 2 / 12)
    assert agreement(torch.tensor([[1.0, -1.0], [2.0, -2.0]])) == pytest.approx(-1.5)
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).double()
    assert abs(agreement(x)) < 0.05
    common = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1)).double()
    assert agreement(x + common) == pytest.approx(0.5, abs=0.05)
    assert agreement(x[:, :1]) is None and agreement(torch.zeros(2, 2)) is None


def test_units_are_neighbors():
    each = torch.arange(8.0).unsqueeze(0)
    assert in_units(each, None).tolist() == [[0.5, 2.5, 4.5, 6.5]]
    assert in_units(each, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).tolist() == [[0.5, 2.5], [4.5, 6.5]]
    assert in_units(each, torch.arange(8)).tolist() == [[number] for number in range(8)]
    assert in_units(each, number=2).tolist() == [[1.5, 5.5]]


def test_tables_count_by_their_pairs_and_looks_as_one_each():
    """One pair in the first table, six in the second; a table that tells nothing does not count."""
    size = StepSize()
    pair, alike = torch.tensor([[1.0, 3.0]]), torch.ones(1, 4)
    expected = (agreement(pair) + 6 * agreement(alike)) / 7
    size.compare(pair, alike, torch.zeros(3, 2), torch.full((1, 4), math.nan), samples=3)
    assert size.agreement.count == 3 and size.agreement.mean == pytest.approx(expected)
    size.compare(torch.zeros(3, 2), torch.ones(4, 1))
    assert size.agreement.count == 3


@pytest.mark.parametrize("few", [False, True])
def test_what_chance_may_have_added_to_the_signal_is_taken_off(few):
    """κ − e of a mean κ with the standard error e, κ − e²/κ where there are few looks; 0 where that is not positive."""
    size = StepSize(few=few)
    for kappa in (0.1, 0.3):
        size.compare(torch.ones(1, 2))
        size.agreement = RunningMean(0.1, 100, kappa, kappa**2 + 0.2**2 * 18)  # e = 0.2 at 19 effective looks
        assert size.agreement.error == pytest.approx(0.2)
        assert size.signal == pytest.approx(max(0.0, kappa - (0.2**2 / kappa if few else 0.2)))


def test_the_rate_is_its_formula():
    """η = ½ / (M h / (K s) + ‖H‖_F), K s / M being K n / (M NOISE_SCALE) at least, or N / NOISE_SCALE; ‖H‖_F no less than its part of h."""
    known = StepSize(
        curvature=RunningMean(0.1, 9, 10.0, 100.0),
        spread=RunningMean(0.1, 9, 100.0, 0.0),
        agreement=RunningMean(0.1, 9, 0.5, 0.25),
        moment=RunningMean(0.1, 9, 4.0, 16.0),
    )
    assert known.rate(1, 16) == pytest.approx(CAUTION / (10 / 0.5 + 2.5))
    assert known.rate(8, 16) == pytest.approx(CAUTION / (10 / 4 + 2.5))
    known.spread.mean = 100.0 + 2 * 3.0**2
    assert known.rate(8, 16) == pytest.approx(CAUTION / (10 / 4 + 3))
    known.units = 3  # a coefficient of three units: κU / (1 + κ(U − 1))
    assert known.rate(8, 16) == pytest.approx(CAUTION / (10 / (8 * 0.75) + 3))
    known.agreement = RunningMean(0.1, 9, -0.5, 0.25)
    assert known.rate(1, round(0.1 * NOISE_SCALE)) == pytest.approx(CAUTION / (10 / 0.1 + 3))
    known.single = RunningMean(0.1, 9, 0.2 * 4.0 * NOISE_SCALE)
    assert known.rate(1, 16) == pytest.approx(CAUTION / (10 / 0.2 + 3))


def test_a_saddles_norm_is_assumed_large_from_few_halves():
    """Var[ZᵀHZ] and its standard error, where h is within three of its own from 0 and directions belong to examples."""
    saddle, norm = RunningMean(0.1, 9, 1.0, 10.0), math.sqrt((4.0 + 1.0 - 1.0) / 2)  # h = 1 ± 1.06; 4 ± 1
    known = StepSize(
        curvature=saddle,
        spread=RunningMean(0.1, 9, 4.0, 16.0 + 8),
        agreement=RunningMean(0.1, 9, 0.25, 0.0625),
        moment=RunningMean(0.1, 9, 4.0, 16.0),
        few=True,
    )
    assert known.curvature.error == pytest.approx(1.0607, abs=1e-4) and known.spread.error == pytest.approx(1.0)
    mean = 1.0 + known.curvature.error
    assert known.rate(8, 16) == pytest.approx(CAUTION / (mean / (8 * 0.25) + norm))
    known.few = False
    assert known.rate(8, 16) == pytest.approx(CAUTION / (mean / (8 * 0.25) + math.sqrt((4.0 - 1.0) / 2)))


def test_a_rising_loss_brakes_and_measuring_releases():
    size = StepSize()
    for _ in range(20):
        size.record_step([1.0], 1.0)
    assert size.brake == 1.0
    for _ in range(5):
        size.record_step([1.0], 5.0)
    assert size.brake == 0.5
    size.record_losses(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]), 1e-2)
    assert size.brake == pytest.approx(0.55)


def test_rules_scale_the_rate():
    assert rule_gain(Rule("SGD", {"momentum": 0.9}), 4.0, 1) == pytest.approx(0.1)
    assert rule_gain(Rule("EMASGD", {"beta": 0.9}), 4.0, 1) == 1.0
    assert rule_gain(Rule("AdamW", {}), 4.0, 4) == 1.0
    assert rule_gain(Rule("RMSprop", {"alpha": 0.96}), 4.0, 4) == 1.0
    assert rule_gain(Rule("RMSprop", {"alpha": 0.96}), 4.0, 4, step=0) == pytest.approx(0.2)  # its first step is five times as long
    assert rule_gain(Rule("Sign", {}), 4.0, 4) == pytest.approx(math.sqrt(2 / math.pi))
    with pytest.raises(ValueError, match="not known for the update rule Rprop; give a number"):
        rule_gain(Rule("Rprop", {}), 4.0, 4)


@pytest.mark.parametrize("name", ["es", "es-ranks", "fzoo", "meazo", "zo-sgd-scalar-sign"])
def test_a_shaped_step_is_as_long_as_that_of_plain_sgd(name):
    """On coefficients c ~ N(0, M): gain · rms(c′) is √M, the rms of c, but for the factor √(2/π) of a sign."""
    k, moment, eps = 2000, 4.0, 1e-2
    method = methods.get(name, num_directions=k)
    c = math.sqrt(moment) * torch.randn(k, generator=torch.Generator().manual_seed(0)).double()
    fitness = FITNESS[method.fitness]
    shaped = c if fitness is None else fitness.coefficients((2.0 + eps * c).unsqueeze(1), (2.0 - eps * c).unsqueeze(1)).double()
    if method.shaping is not None:
        shaped = torch.tensor(method.shaping.shape(shaped.tolist(), [False] * k, eps, {}))
    size = gain(method, Rule(method.update_rule, method.update_rule_args), moment, k, eps) * float(shaped.square().mean().sqrt())
    expected = math.sqrt(2 / math.pi * moment) if name == "zo-sgd-scalar-sign" else math.sqrt(moment)
    assert size == pytest.approx(expected, rel=0.05)


def test_a_replayed_momentum_adds_up_to_its_weights():
    method = methods.replayed_momentum(momentum=0.5, history=3)
    assert gain(method, Rule("SGD", {}), 4.0, 1, 1e-3) == pytest.approx(1 / (1 + 0.5 + 0.25))


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# -- in a run ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MEASURABLE if name != "bszo"])  # whose prior has the unit of a slope
def test_the_unit_of_the_loss_does_not_matter(name):
    """Losses times a power of two: a rate divided by it (for Adam the same), and the same run."""

    def losses(unit: float) -> list[float]:
        model = toys.classifier()
        optimizer = ZerothOrder(model, toys.method(name, interval=50, eps=2.0**-7), lr="auto")
        return [float(optimizer.step(lambda b: unit * toys.loss_function(model)(b), toys.batch(seed=step))) / unit for step in range(20)]

    expected = losses(1.0)
    for scale in (2.0**-10, 2.0**10):
        assert losses(scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", MEASURABLE)
def test_learns_a_small_classification_problem_without_a_rate(name):
    model = toys.classifier()
    optimizer = ZerothOrder(model, toys.method(name, interval=50, **AUTO), lr="auto")
    steps = 400 if name in ("kerzoo", "tezo") else 200
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for step in range(steps):
        losses.append(float(optimizer.step(toys.loss_function(model), toys.batch(16, seed=step))))
        schedule.step()
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])  # a sparse or narrow subspace gets no further in these steps
    worst = 2.0 if name == "zo-block" else 1.2  # one block after the other is measured, and moved
    assert max(losses) < worst * losses[0]


@pytest.mark.parametrize("name", MEASURABLE)
def test_resume_and_replay_are_bit_for_bit(name, tmp_path):
    def build(**options) -> tuple[nn.Module, ZerothOrder]:
        model = toys.classifier()
        return model, ZerothOrder(model, toys.method(name, interval=50, **AUTO), lr="auto", **options)

    straight, optimizer = build(journal=tmp_path / "j")
    losses = run(straight, optimizer, 0, 30)
    rebuilt = toys.classifier()
    replay(rebuilt, tmp_path / "j", method=optimizer.method)
    assert equal(rebuilt, straight)
    halted, first = build()
    begun = 0
    for stop in (1, INTERVAL, INTERVAL + 3):
        run(halted, first, begun, stop)
        begun = stop
        resumed, second = build()
        resumed.load_state_dict(copy.deepcopy(halted.state_dict()))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert run(resumed, second, stop, 30) == losses[stop:]
        assert equal(resumed, straight)
        assert (second.forward_passes, second.sequences_evaluated) == (optimizer.forward_passes, optimizer.sequences_evaluated)


def test_a_calibration_is_in_the_journal_with_its_forwards(tmp_path):
    model = toys.classifier()
    forwards = 0

    def counted(module, *unused):
        nonlocal forwards
        forwards += 1

    optimizer = ZerothOrder(model, methods.lozo(**AUTO), lr="auto", journal=tmp_path / "j", forward_batching="sequential")
    run(model, optimizer, 0, 1)
    model.register_forward_hook(counted)
    before = optimizer.forward_passes
    run(model, optimizer, 1, 25)
    assert forwards == optimizer.forward_passes - before == 2 * 24 + 3 * 6  # measured at 1, 2, 4, 8, 16, 20
    events = [record for record in optimizer.journal.records() if isinstance(record, dict)]
    assert (events[0]["event"], events[0]["value"]) == ("eps", optimizer.eps) and optimizer.eps in LADDER
    assert sum(event["forwards"] for event in events) + 2 * 25 == optimizer.forward_passes
    assert sum(event["sequences"] for event in events) + 2 * 25 * 8 == optimizer.sequences_evaluated
    assert [event["event"] for event in events[1:]] == ["measured"] * 7
    found = {"event", "curvature", "signal", "moment", "brake", "forwards", "sequences"}
    assert [set(event) - found for event in events[1:]] == [{"state"}] + [set()] * 6, "all that is known, at the first, and now and then"


@pytest.mark.parametrize(("directions", "expected"), [({"directions_per": "group", "group_size": 2}, 1.0), ({}, 0.0)])
def test_the_signal_of_own_directions_is_what_sets_agree_in(directions, expected):
    """ℓ_b(w) = (g ± a)ᵀw, the sign by turns: pairs have the same gradient, single examples hardly anything in common."""
    generator = torch.Generator().manual_seed(0)
    g, a = torch.randn(2, 40, generator=generator)
    rows = g + 10 * a * torch.tensor([1.0, -1.0]).repeat(8).unsqueeze(1)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(40))
    optimizer = ZerothOrder(model, methods.lozo_e(**directions, **AUTO), lr="auto", forward_batching="sequential")
    for _ in range(20):
        optimizer.step(lambda x: x @ model.w + 0.5 * model.w.square().sum(), rows)
    assert optimizer.calibrator.step_size.signal == pytest.approx(expected, abs=0.1)


def test_meazos_rate_follows_its_average_where_coefficients_grow():
    """Growing coefficients, as an adapter's: their long average lags behind, and divided by that a step would be too long."""
    method, state = methods.meazo(), {}
    for t in range(20):
        method.shaping.shape([2.0**t], [False], 1e-3, state)
    (unit,) = method.shaping.shape([2.0**20], [False], 1e-3, dict(state))
    assert unit > 2
    average = state["v"] / (1 - 0.999**20)
    assert gain(method, Rule("SGD", {}), 4.0**20, 1, 1e-3, shaping=state) == pytest.approx(math.sqrt(average))
    assert gain(method, Rule("SGD", {}), average / 4, 1, 1e-3, shaping=state) == pytest.approx(math.sqrt(average) / 2)


def test_schedules_and_groups_multiply_what_is_measured():
    model = toys.classifier()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.25}]
    optimizer = ZerothOrder(model, "lozo", lr="auto", params=groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    for step in range(4):
        run(model, optimizer, step, step + 1)
        schedule.step()
        first, second = optimizer.last_report.lr
        assert second == pytest.approx(0.25 * first) and (first > 0) == (step < 2)


def test_a_scalar_loss_does_too():
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.mezo(**AUTO), lr="auto")
    losses = [float(optimizer.step(lambda b: toys.loss_function(model)(b).mean(), toys.batch(32, seed=step))) for step in range(200)]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    assert all(b < 1.5 * a for a, b in pairwise(losses))


def test_the_global_generator_is_left_alone():
    model = toys.classifier()
    optimizer = ZerothOrder(model, methods.lozo_e(**AUTO), lr="auto")
    state = torch.get_rng_state()
    run(model, optimizer, 0, 3)
    assert torch.equal(torch.get_rng_state(), state)


class Quartic(nn.Module):
    """Examples' losses −g·w + ¼ ‖w‖⁴, g about the same for all, at w = 0: a slope without curvature, and walls at a distance."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(10))

    def forward(self, g):
        return 0.25 * self.w.square().sum() ** 2 - g @ self.w


@pytest.mark.parametrize("name", ["mezo", "lozo-e"])
def test_curvature_is_measured_as_far_away_as_a_step_goes(name):
    model = Quartic()
    optimizer = ZerothOrder(model, methods.get(name, eps=1e-3), lr="auto", forward_batching="sequential")
    farthest, losses = 0.0, []
    for step in range(100):
        g = 1 + 0.1 * torch.randn(16, 10, generator=torch.Generator().manual_seed(step))
        losses.append(float(optimizer.step(model, g)))
        size = optimizer.calibrator.step_size
        if step in (0, 1, 2, 4, 8):
            assert size.stride <= WIDER * max(size.radius, WIDEST / WIDER), "it was looked at before anything went there"
        farthest = max(farthest, size.radius)
    assert farthest > 10 * 1e-3
    assert all(math.isfinite(loss) and loss < 5 for loss in losses)
    least = 0.25 * 10 ** (4 / 6) - 10 ** (1 / 2 + 1 / 6)
    assert sum(losses[-20:]) / 20 < 0.8 * least


def test_a_distance_where_losses_are_not_finite_is_not_gone_to():
    model = Quartic()
    optimizer = ZerothOrder(model, methods.mezo(eps=1e-3), lr="auto", forward_batching="sequential")

    def walled(g):
        loss = model(g)
        return torch.where(model.w.abs().amax() > 0.02, math.inf, loss)

    g = torch.ones(16, 10)
    losses = [float(optimizer.step(walled, g)) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses) and float(model.w.detach().abs().amax()) < 0.02


def test_a_step_goes_no_farther_than_measured_curvature_allows():
    """η rms(c) / √K is how far a step goes, in units of a direction's length."""
    size = StepSize(radius=0.1)
    for rms, directions, leapt in [(1.0, 1, False), (2.5, 1, False), (4.0, 1, True), (4.0, 4, False), (8.0, 4, True)]:
        size.record_step([rms, -rms], 1.0)
        length = 0.1 * rms / math.sqrt(directions)
        expected = 0.1 * min(1.0, REACH * size.radius / length)
        assert size.within_reach(0.1, directions) == pytest.approx(expected)
        assert size.leapt == leapt == (length > LEAP * size.radius)
    size.sample_at(0.1)
    assert not size.leapt
    assert StepSize().within_reach(7.0, 1) == 7.0  # nothing has been looked at


def test_a_suddenly_large_gradient_has_the_curvature_measured():
    weights = nn.Parameter(torch.zeros(20))
    model = nn.ParameterList([weights])
    optimizer = ZerothOrder(model, methods.get("mezo", eps="auto"), lr="auto", seed=0, forward_batching="sequential")

    def loss(slope):
        return (slope * model[0].sum() + model[0].square().sum()).expand(4)

    leaps = 0
    for step in range(40):
        before, leapt = optimizer.forward_passes, optimizer.calibrator.step_size.leapt
        optimizer.step(loss, 1.0 if step < 25 else 100.0)
        size = optimizer.calibrator.step_size
        c = abs(float(optimizer.last_report.coefficients[0]))
        assert optimizer.last_report.lr[0] * c <= REACH * size.radius * (1 + 1e-6)
        assert optimizer.forward_passes > before + 2 or not leapt
        leaps += size.leapt
    assert leaps
