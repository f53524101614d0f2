"""Score matching from a noisy start: transitions, targets and the three critics of TDM."""

from __future__ import annotations

import pytest
import torch
from gaussians import PROCESSES

from lightning_distill.losses.score_matching import denoising_loss, space_weight
from lightning_distill.losses.subinterval import (
    balanced_weight,
    importance_weight,
    noise_further,
    subinterval_target,
    subinterval_weight,
    transition,
)
from lightning_distill.prediction import PREDICTION_TYPES, Prediction
from lightning_distill.processes import FlowMatching

STARTS = {"flow": (0.1, 0.6), "vp": (0.1, 0.6), "edm": (0.05, 0.7), "trig": (0.1, 0.8)}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_two_transitions_are_one(name):
    """Data to u to t has the law of data to t, in mean and variance."""
    process, times = PROCESSES[name]
    u, t = double(*STARTS[name]), double(times[1] * 1.01, times[2])
    a, s = transition(u, t, process)
    torch.testing.assert_close(a * process.alpha(u), process.alpha(t))
    torch.testing.assert_close((a * process.sigma(u)) ** 2 + s**2, process.sigma(t) ** 2)
    middle = (u + t) / 2
    (a1, s1), (a2, s2) = transition(u, middle, process), transition(middle, t, process)
    torch.testing.assert_close(a1 * a2, a)
    torch.testing.assert_close((a2 * s1) ** 2 + s2**2, s**2)


@pytest.mark.parametrize("name", PROCESSES)
def test_from_clean_samples_it_is_the_process_bit_for_bit(name):
    process, times = PROCESSES[name]
    t, u = double(*times), double(0, 0, 0)
    x0, n = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(noise_further(x0, u, t, n, process), process.add_noise(x0, n, t))
    target, eps = subinterval_target(x0, u, t, n, process)
    assert torch.equal(target, x0)
    assert torch.equal(eps, n)
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.equal(subinterval_weight(u, t, process), ones)
    assert torch.equal(balanced_weight(u, t, process, 7.0 * ones), ones)


@pytest.mark.parametrize("name", PROCESSES)
def test_targets_add_up_and_their_mean_is_the_score(name):
    """The linear regression of eps* on x_t is -sigma_t times the score of x_t, for any Gaussian x_u."""
    process, times = PROCESSES[name]
    u, t = double(STARTS[name][0]), double(times[2])
    generator = torch.Generator().manual_seed(0)
    z, n = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    # orthonormal draws: the sample moments are the exact ones
    z = z - z.mean()
    z = z / z.square().mean().sqrt()
    n = n - n.mean() - (n * z).mean() * z
    n = n / n.square().mean().sqrt()
    x_u = 0.4 + 0.9 * z
    x_t = noise_further(x_u, u, t, n, process)
    x0, eps = subinterval_target(x_u, u, t, n, process)
    torch.testing.assert_close(process.add_noise(x0, eps, t), x_t)
    a, s = transition(u, t, process)
    variance = float(a) ** 2 * 0.81 + float(s) ** 2
    centred = x_t - float(a) * 0.4
    slope = float((eps * centred).mean() / centred.square().mean())
    assert slope == pytest.approx(float(process.sigma(t)) / variance, rel=1e-9)
    for space in (*PREDICTION_TYPES, "edm"):
        best = Prediction(slope * centred, x_t, t.expand(len(x_t)), process, "epsilon")
        perfect = float(denoising_loss(best, x0, eps, space))
        for factor in (0.9, 1.1):
            other = Prediction(factor * slope * centred, x_t, t.expand(len(x_t)), process, "epsilon")
            assert float(denoising_loss(other, x0, eps, space)) > perfect


def test_the_weight_bounds_the_error_near_the_start():
    process, u = FlowMatching(), double(0.5, 0.5, 0.5)
    t = double(0.5 + 1e-9, 0.52, 0.9)
    s = transition(u, t, process)[1]
    want = [float(v**2 * min(1 / v**2, 10.0)) for v in s.tolist()]
    assert subinterval_weight(u, t, process).tolist() == pytest.approx(want)
    assert float(subinterval_weight(u, t, process)[0]) < 1e-6


@pytest.mark.parametrize("name", PROCESSES)
def test_the_other_weight_is_by_the_deviation_that_no_critic_takes_away(name):
    """x0* is linear in the two noises, of which x_t fixes one combination: the other has the variance V."""
    process, times = PROCESSES[name]
    u, t = double(STARTS[name][0], STARTS[name][0]), double(times[1] * 1.01, times[2])
    a, s = transition(u, t, process)
    zero, one = torch.zeros(2, 1).double(), torch.ones(2, 1).double()
    of_eps = subinterval_target(process.sigma(u)[:, None], u, t, zero, process)[0][:, 0]
    of_n = subinterval_target(zero, u, t, one, process)[0][:, 0]
    known = torch.stack([a * process.sigma(u), s]) / process.sigma(t)
    both = torch.stack([of_eps, of_n])
    left = both.square().sum(0) - (both * known).sum(0).square()
    for w in (double(1.0, 1.0), double(0.3, 20.0)):
        torch.testing.assert_close(balanced_weight(u, t, process, w), (1.0 + w * left).rsqrt())
    assert balanced_weight(u, u, process, double(1.0, 1.0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("space", [*PREDICTION_TYPES, "edm", "scaled_epsilon"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_weight_of_a_space_is_that_of_its_loss(name, space):
    process, times = PROCESSES[name]
    for t in double(*times)[1:]:
        x0, eps, off = torch.randn(3, 5, 2).double().unbind()[:3]
        when = t.expand(5)
        x_t = process.add_noise(x0, eps, when)
        got = denoising_loss(Prediction.from_x0(x0 + off, x_t, when, process), x0, eps, space, 0.7)
        want = space_weight(space, t, process, 0.7) * off.square().mean()
        assert float(got) == pytest.approx(float(want), rel=1e-6)


# ------------------------------------------------------------------------------------------------ TDM's critic
def slopes(n=400):
    """Best linear critics at t = .65 for a posterior-mean student of data N(0, .25) from t = .75 to .5 (flow)."""
    data, tg, mid, tau = 0.25, 0.75, 0.5, 0.65
    law = (1 - tg) ** 2 * data + tg**2
    grid = torch.linspace(-9, 9, n, dtype=torch.float64)
    z, fresh = (g.reshape(-1, 1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    weight = torch.exp(-0.5 * (z**2 + fresh**2))
    x_g = law**0.5 * z
    x0 = (1 - tg) * data / law * x_g
    x_u = (1 - mid) * x0 + mid * (x_g - (1 - tg) * x0) / tg
    process, u, t = FlowMatching(), double(mid).expand(len(z)), double(tau).expand(len(z))
    x_t = noise_further(x_u, u, t, fresh, process)

    def slope(target, w):
        return float((w * target * x_t).sum() / (w * x_t**2).sum())

    ambient = subinterval_target(x_u, u, t, fresh, process)[0]
    corrected = weight * importance_weight(x_t, x0, fresh, t, process)[:, None]
    return slope(x0, weight), slope(x0, corrected), slope(ambient, weight), x_t, weight, x0


def test_the_three_targets_have_their_known_slopes():
    plain, corrected, ambient, x_t, weight, x0 = slopes()
    assert plain == pytest.approx(0.0699, abs=5e-5)
    assert corrected == pytest.approx(0.005586, abs=5e-6)
    assert ambient == pytest.approx(0.1129, abs=5e-5)
    # Tweedie's formula for the law of x_t, and for that of noised x0
    variance = float((weight * x_t**2).sum() / weight.sum())
    assert ambient == pytest.approx((1 - 0.65**2 / variance) / 0.35, rel=1e-6)
    clean = float((weight * x0**2).sum() / weight.sum())
    assert corrected == pytest.approx(0.35 * clean / (0.35**2 * clean + 0.65**2), rel=1e-6)
