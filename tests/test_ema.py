"""Averages of the student: profiles and the update."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_distill import ema
from lightning_distill.ema import ConstantEMA, HalfLifeEMA, PowerEMA, check_horizon, update_average
from lightning_distill.live_memory import LiveMemory


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_profiles_have_the_published_exponents(sigma_rel, gamma):
    profile = PowerEMA(sigma_rel)
    assert profile.gamma == pytest.approx(gamma, abs=0.005)
    g = profile.gamma
    assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_power_average_has_the_relative_width_it_is_named_after(sigma_rel):
    """Weights of update k in the average after n updates, their standard deviation divided by n."""
    n, profile = 3000, PowerEMA(sigma_rel)
    betas = [profile.beta(k, 1) for k in range(1, n + 1)]
    assert betas[0] == 0.0  # nothing of the initial weights is kept
    weights, later = [], 1.0
    for beta in reversed(betas):
        weights.append((1.0 - beta) * later)
        later *= beta
    weights = torch.tensor(weights[::-1], dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    k = torch.arange(1, n + 1, dtype=torch.float64)
    mean = (weights * k).sum()
    assert float(((weights * (k - mean) ** 2).sum()).sqrt() / n) == pytest.approx(sigma_rel, rel=2e-3)
    # the profile itself: proportional to k^gamma
    ratio = weights[n // 2 - 1] / weights[-1]
    assert float(ratio) == pytest.approx(0.5**profile.gamma, rel=0.02)


def test_constant_average_is_the_closed_form_sum():
    average, decay = [torch.zeros(3)], 0.9
    values = [torch.full((3,), float(k * k)) for k in range(1, 6)]
    for value in values:
        update_average(average, [value], ConstantEMA(decay).beta(1, 8))
    want = sum((1 - decay) * decay ** (5 - k) * v for k, v in enumerate(values, 1))
    torch.testing.assert_close(average[0], want)


def test_half_life_is_counted_in_samples():
    profile = HalfLifeEMA(half_life=1000, ramp_up=None)
    product = math.prod(profile.beta(k, 50) for k in range(1, 21))
    assert product == pytest.approx(0.5)
    ramped = HalfLifeEMA(half_life=1000, ramp_up=0.05)
    for update in (1, 10, 399, 400, 401, 2000):
        half_life = min(1000, 0.05 * update * 50)
        assert ramped.beta(update, 50) == pytest.approx(0.5 ** (50 / half_life))


def test_memory_is_the_share_of_the_initial_weights():
    assert ConstantEMA(0.999).memory(300, 8) == pytest.approx(0.999**300)
    assert PowerEMA(0.1).memory(5, 8) < 1e-100
    average = [torch.ones(())]
    for k in range(1, 31):
        update_average(average, [torch.zeros(())], HalfLifeEMA(100).beta(k, 8))
    assert float(average[0]) == pytest.approx(HalfLifeEMA(100).memory(30, 8), rel=1e-4)


def test_averages_stay_float32_and_skipped_steps_leave_them():
    student = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]
    average = [torch.zeros(2)]
    update_average(average, student, 0.75, torch.tensor(1.0))
    assert torch.equal(average[0], torch.zeros(2))
    update_average(average, student, 0.75, torch.tensor(0.0))
    assert average[0].dtype == torch.float32
    torch.testing.assert_close(average[0], torch.tensor([0.25, 0.5]))
    update_average(average, student, 0.75)
    torch.testing.assert_close(average[0], torch.tensor([0.4375, 0.875]))
    with pytest.raises(ValueError, match="average of 1 tensors cannot follow a network of 2"):
        update_average(average, [*student, *student], 0.5)


@pytest.mark.parametrize("skipped", [None, 0.0], ids=["always", "asked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_update_needs_the_memory_of_a_portion(monkeypatch, skipped, dtype):
    student = [torch.randn(5000, dtype=dtype) for _ in range(12)]
    whole, average = ([torch.zeros(5000) for _ in student] for _ in range(2))
    told = None if skipped is None else torch.tensor(skipped)
    update_average(whole, student, 0.25, told)
    monkeypatch.setattr(ema, "_PORTION", 50_000)  # two tensors
    live = LiveMemory()
    live.ignore([*average, *student])
    with live:
        update_average(average, student, 0.25, told)
    assert live.peak <= 2 * 50_000 < sum(t.nbytes for t in average)
    assert all(torch.equal(a, b) for a, b in zip(average, whole, strict=True))


def test_a_long_horizon_warns_with_the_share_of_the_teacher():
    with pytest.warns(UserWarning, match="averages over 1000 updates, but the run has 300: 74 %"):
        check_horizon([ConstantEMA(0.999)], 300)
    with pytest.warns(UserWarning, match="has 9000: the average will lag 1000 updates behind the student"):
        check_horizon([ConstantEMA(0.999)], 9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_horizon([ConstantEMA(0.999), PowerEMA(0.1), HalfLifeEMA()], 10_001)
        check_horizon([PowerEMA(0.1)], 10)
        check_horizon([ConstantEMA(0.9999)], -1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantEMA(1.0), "between 0 and 1"),
        (lambda: ConstantEMA(0.0), "between 0 and 1"),
        (lambda: HalfLifeEMA(0), "positive number of samples"),
        (lambda: PowerEMA(0.3), "between 0 and 0.28"),
        (lambda: PowerEMA(0.0), "between 0 and 0.28"),
    ],
)
def test_impossible_profiles_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_can_be_module_names():
    names = [p.name for p in (ConstantEMA(0.999), HalfLifeEMA(500_000), HalfLifeEMA(2e6), PowerEMA(0.05))]
    assert names == ["constant_0_999", "half_life_500000", "half_life_2e06", "power_0_05"]
