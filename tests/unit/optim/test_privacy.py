"""Private steps: how much one example changes what is released, which noise is added to it, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zotune
from zotune.optim import accounting, privacy_refusals
from zotune.optim.journal import Journal
from zotune.optim.journal_records import StepRecord
from zotune.optim.privacy import PARTS, SLACK, Privacy, PrivateSteps, clipped_sums
from zotune.rng.secret import SecretStream

KEY = bytes(range(32))
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] * 2


def privacy(**options: Any) -> Privacy:
    public = torch.ones(4, 4) * torch.arange(4.0)[:, None], torch.ones(4, 1)
    usual = {"clip": 1.0, "noise_multiplier": 1.0, "examples": 60, "batch_size": 12, "public_batch": public, "key": KEY}
    return Privacy(**{**usual, **options})


def optimizer(promise: Privacy | None, method: str = "mezo", journal: Path | None = None, **options: Any) -> zotune.ZerothOrder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    chosen = zotune.methods.get(method, eps=1e-2, **options)
    return zotune.ZerothOrder(model, chosen, lr=1e-2, seed=1, journal=journal, privacy=promise)


def steps(run: zotune.ZerothOrder, count: int) -> list[list[float]]:
    """The coefficients of so many steps."""
    found = []
    for _ in range(count):
        sample = run.sample()
        run.step(lambda batch: (run.model(batch[0]) - batch[1]).square().mean(dim=1), (X[sample], Y[sample]) if sample else [])
        found.append(run.last_report.coefficients.tolist())
    return found


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), st.tuples(NUMBERS, NUMBERS), st.floats(1e-3, 1e3))
def test_replacing_an_example_changes_a_sum_by_twice_the_clip(rows: Any, other: Any, clip: float) -> None:
    singles = torch.tensor(rows, dtype=torch.float64).T
    replaced = singles.clone()
    replaced[:, 0] = torch.tensor(other, dtype=torch.float64)
    before, after, without = clipped_sums(singles, clip), clipped_sums(replaced, clip), clipped_sums(singles[:, 1:], clip)
    assert all(abs(a - b) <= 2 * PARTS for a, b in zip(before, after, strict=True))
    assert all(abs(a - b) <= PARTS for a, b in zip(before, without, strict=True))


def test_coefficients_within_the_clip_are_summed_as_they_are() -> None:
    singles = torch.tensor([[0.5, -2.0, math.nan, 7.0]], dtype=torch.float64)
    (found,) = clipped_sums(singles, 4.0)
    assert found * 4.0 / PARTS == 0.5 - 2.0 + 4.0


def test_the_noise_has_the_stated_deviation() -> None:
    promise = privacy(noise_multiplier=1.5, clip=2.0)
    private = PrivateSteps(promise)
    private.begin({})
    k = 4000
    found = private.estimate(None, k).coefficients.double() * promise.batch_size
    expected = 1.5 * math.sqrt(k) * 2.0 * (1 + SLACK)
    assert abs(float(found.std()) / expected - 1) < 5 / math.sqrt(2 * k)  # five standard errors
    assert abs(float(found.mean())) < 5 * expected / math.sqrt(k)


def test_every_example_is_drawn_with_the_stated_probability() -> None:
    stream, n, q, rounds = SecretStream(KEY), 500, 0.1, 400
    drawn = sum((stream.uniforms("sample", bytes([r % 256, r // 256]), n) < q).astype(int) for r in range(rounds))
    spread = math.sqrt(rounds * q * (1 - q))
    assert abs(drawn.mean() - rounds * q) < 5 * spread / math.sqrt(n)
    assert abs(drawn.std() / spread - 1) < 5 / math.sqrt(2 * n)  # no example more often than others


def test_a_key_makes_the_noise_and_the_journal_has_no_loss(tmp_path: Path) -> None:
    runs = {name: optimizer(privacy(key=key), journal=tmp_path / name) for name, key in (("a", KEY), ("b", KEY), ("c", KEY[::-1]))}
    a, b, c = (steps(run, 3) for run in runs.values())
    assert a == b
    assert a[0] != c[0]
    for name in runs:
        journal = Journal.open(tmp_path / name)
        records = [record for record in journal.records() if isinstance(record, StepRecord)]
        assert len(records) == 3 and all(math.isnan(record.loss) and not any(record.skipped) for record in records)
        assert KEY.hex() not in str(journal.header) and journal.header["privacy"]["clip"] == 1.0


def test_runs_of_one_key_that_diverge_share_no_noise() -> None:
    first, second = (optimizer(privacy(noise_multiplier=1e4)) for _ in range(2))
    second.param_groups[0]["lr"] = 2e-2
    a, b = steps(first, 2), steps(second, 2)
    assert a[0] == b[0]
    assert abs(a[1][0] - b[1][0]) > 1  # noise of about 800 hides the data


def test_a_step_counts_the_expected_examples() -> None:
    run = optimizer(privacy(batch_size=1))
    samples = [len(run.sample()) for _ in [*range(6)] if steps(run, 1)]
    assert 0 in samples and max(samples) > 0
    assert run.sequences_evaluated == 6 * 2 * 1


def test_a_private_run_replays_and_resumes_exactly(tmp_path: Path) -> None:
    whole = optimizer(privacy(), "lozo", tmp_path / "journal", num_directions=2, interval=2)
    steps(whole, 3)
    weights, state = {name: value.clone() for name, value in whole.model.state_dict().items()}, copy.deepcopy(whole.state_dict())
    after = steps(whole, 2)
    resumed = optimizer(privacy(), "lozo", num_directions=2, interval=2)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert steps(resumed, 2) == after
    with pytest.raises(ValueError, match="the key is not that of the saved run"):
        optimizer(privacy(key=KEY[::-1]), "lozo", num_directions=2, interval=2).load_state_dict(state)
    with pytest.raises(ValueError, match="would continue it without noise"):
        optimizer(None, "lozo", num_directions=2, interval=2).load_state_dict(state)
    base = optimizer(None).model
    rebuilt = zotune.replay(base, tmp_path / "journal")
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in rebuilt.model.state_dict().items())


def test_a_loss_that_mixes_its_examples_is_refused() -> None:
    run = optimizer(privacy())

    def mixed(batch: Any) -> torch.Tensor:
        losses = (run.model(batch[0]) - batch[1]).square().mean(dim=1)
        return losses / losses.sum()

    sample = run.sample()
    run.evaluator.restore(False, False)
    with pytest.raises(ValueError, match=r"change by .* with the examples beside them"):
        run.step(mixed, (X[sample], Y[sample]))
    with pytest.raises(ValueError, match="one loss for each of its 4 examples"):
        run.step(lambda batch: (run.model(batch[0]) - batch[1]).square().mean(), (X[sample], Y[sample]))
    with pytest.raises(ValueError, match="the step's sample has"):
        run.step(lambda batch: (run.model(batch[0]) - batch[1]).square().mean(dim=1), (X[:30], Y[:30]))
    with pytest.raises(ValueError, match="a batch of the sampled examples"):
        run.step(lambda: torch.zeros(()))


def test_every_method_is_private_or_refused_with_a_reason() -> None:
    for name in zotune.methods.names():
        options = {"num_directions": 2} if "num_directions" in zotune.methods.options_of(name) else {}
        method = zotune.methods.get(name, **options)
        reason = privacy_refusals.refusal(method if isinstance(method.eps, float) else replace(method, eps=1e-3))
        if reason is None:
            assert not method.subspace.needs_data(0) and not method.own and method.fitness == "loss", name
        else:
            assert reason.endswith("."), name


REFUSED = {
    "agzo": "chooses its subspace by training examples",
    "lozo-g": "along output gradients",
    "lozo-e": "measures scales of layers",
    "mezo-svrg": "at its snapshot",
    "hizoo": "curvatures",
    "zo-sgd-cons": "by the losses behind it",
    "dizo": "how far layers are moved",
}


def test_methods_that_read_more_of_the_data_say_what() -> None:
    for name, reason in REFUSED.items():
        assert reason in (privacy_refusals.refusal(zotune.methods.get(name)) or ""), name
    assert privacy_refusals.refusal(zotune.methods.get("mezo")) is None
    for options, reason in (({"eps": "auto"}, "eps='auto' is measured"), ({"fitness": "ranks"}, "all examples together")):
        assert reason in (privacy_refusals.refusal(zotune.methods.get("mezo", **options)) or "")
    with pytest.raises(ValueError, match="the learning rate 'auto' is measured"):
        zotune.ZerothOrder(nn.Linear(2, 1), zotune.methods.mezo(), lr="auto", privacy=privacy())


def test_settings_out_of_range_are_refused() -> None:
    for options, reason in (
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"delta": 0.1}, "publishing one of them at random"),
        ({"batch_size": 61}, "cannot be drawn"),
        ({"neighbors": "twins"}, "unknown neighbors"),
        ({"key": b"short"}, "must have 32 bytes"),
    ):
        with pytest.raises(ValueError, match=reason):
            privacy(**options)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of the Gaussian mechanism (1805.06530, theorem 8), μ the change over the deviation."""
    normal = torch.distributions.Normal(0.0, 1.0)
    cdf = lambda x: float(normal.cdf(torch.tensor(x, dtype=torch.float64)))  # noqa: E731
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def test_epsilon_is_that_of_published_settings() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    # 1607.00133, section 3.2: q = 0.01, σ = 4, 10000 steps, δ = 1e-5: ε ≈ 1.26 by the moments accountant, which is an upper bound.
    assert 0.9 < accounting.epsilon(4.0, 0.01, 10000, 1e-5, "add-or-remove") < 1.26
    # Every example in every step: the closed form of the Gaussian mechanism, replaced examples twice as far.
    for neighbors, change in (("add-or-remove", 1.0), ("replace-one", 2.0)):
        found = accounting.epsilon(10.0, 1.0, 25, 1e-5, neighbors)
        assert gaussian_delta(found, change * 5 / 10) == pytest.approx(1e-5, rel=0.02)


def test_noise_is_the_least_for_an_epsilon() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    promise = Privacy.for_epsilon(2.0, 50, clip=1.0, examples=1000, batch_size=64, public_batch=None)
    assert 2.0 * 0.99 < promise.epsilon(50) <= 2.0
