"""The path towards a picture: coefficients, the Gaussian closed form, and the matching of trajectories on it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_distill.losses.residual_shift import trajectory_direction, trajectory_matching
from lightning_distill.networks.analytic import GaussianMixture
from lightning_distill.processes import FlowMatching, ResidualShift, TrigFlow, change_process
from lightning_distill.times import few_step_times

F64 = torch.float64
PROCESSES = [ResidualShift(2.0), ResidualShift(0.3), ResidualShift(0.7, "linear")]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_coefficients_their_slopes_and_the_inverse_of_the_signal_to_noise_ratio(process):
    t, h = torch.linspace(0.02, 0.98, 25, dtype=F64), 1e-6
    for value, slope in ((process.alpha, process.d_alpha), (process.sigma, process.d_sigma)):
        torch.testing.assert_close(slope(t), (value(t + h) - value(t - h)) / (2 * h), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(process.t_from_log_snr(process.log_snr(t)), t)
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert torch.equal(process.t_from_log_snr(process.log_snr(ends)), ends)
    assert process.prior_std(1.0) == pytest.approx(process.kappa)
    back, scale = change_process(change_process(t, process, TrigFlow())[0], TrigFlow(), process)
    torch.testing.assert_close(back, t)
    assert bool((scale > 0).all())
    assert few_step_times(process, 4) == [1.0, 0.75, 0.5, 0.25]


def test_a_linear_path_of_unit_noise_is_flow_matching():
    ours, flow, t = ResidualShift(1.0, "linear"), FlowMatching(), torch.linspace(0, 1, 9, dtype=F64)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        assert torch.equal(getattr(ours, name)(t), getattr(flow, name)(t))


@pytest.mark.sparse(3)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_without_its_shift_the_path_has_the_same_trajectories(process):
    """The flow from low + noise to the data, integrated where the shift is, ends where the closed form without it does.

    Data N(m, s^2) given low; z_t ~ N((1 - t) m + t low, (1 - t)^2 s^2 + sigma^2).
    """
    m, s, low = 0.4, 0.3, torch.tensor([[-1.0], [0.2], [2.0]], dtype=F64)
    noise = torch.tensor([[0.5], [-1.2], [0.1]], dtype=F64)

    def variance(t):
        return (1 - t) ** 2 * s**2 + process.sigma(t) ** 2

    def velocity(z, t):  # of a Gaussian flow: mean' + (std' / std) (z - mean)
        slope = -(1 - t) * s**2 + process.sigma(t) * process.d_sigma(t)
        return low - m + slope / variance(t) * (z - (1 - t) * m - t * low)

    z = low + process.kappa * noise
    grid = torch.linspace(1.0, 0.0, 4001, dtype=F64) ** 2  # finer where the noise goes
    for t, r in pairwise(grid):
        middle = z + 0.5 * (r - t) * velocity(z, t)
        z = z + (r - t) * velocity(middle, 0.5 * (t + r))
    closed = GaussianMixture([[m]], std=s).flow_map(process.prior(noise, 1.0), 1.0, 0.0, process)
    torch.testing.assert_close(z, closed, atol=2e-5, rtol=0)
    torch.testing.assert_close(closed, m + s * noise)


@pytest.mark.parametrize("settings", [{"kappa": 0.0}, {"kappa": -1.0}, {"noise": "cosine"}])
def test_bad_paths_are_named(settings):
    with pytest.raises(ValueError, match="kappa > 0, and noise is sqrt or linear"):
        ResidualShift(**settings)


# ------------------------------------------------------------------------------------------------ matching
def test_matching_of_a_gaussian_pulls_towards_the_true_picture_by_a_known_amount():
    process, s, t = ResidualShift(0.5), 0.3, torch.full((6,), 0.4, dtype=F64)
    gaussian = GaussianMixture([[0.1, -0.2]], std=s)
    generator = torch.Generator().manual_seed(0)
    x0, x, noise = (torch.randn(6, 2, generator=generator, dtype=F64) for _ in range(3))
    own, true = (gaussian.flow_map(process.add_noise(p, noise, t), 0.4, 0.0, process) for p in (x, x0))
    gain = 0.6 * s / (0.6**2 * s**2 + 0.5**2 * 0.4) ** 0.5
    expected = gain * (x - x0) / (x - x0).abs().mean(1, keepdim=True)
    torch.testing.assert_close(trajectory_direction(x, own, true, x0), expected)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(trajectory_matching(x, own, true, x0), x)
    torch.testing.assert_close(slope, expected / x.numel())


def test_matching_stops_at_the_data_and_reaches_only_the_restored_picture():
    x, own, true, x0 = (torch.randn(3, 1, 4, 4, requires_grad=True) for _ in range(4))
    same = trajectory_matching(x, own, own, x0)
    assert same.item() == 0.0
    found = torch.autograd.grad(trajectory_matching(x, own, true, x0), [x, own, true, x0], allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1:] == (None, None, None)
    # a restored picture that is the true one up to rounding gets no huge step
    assert trajectory_direction(x0, own, true, x0).abs().max() < 1e3 * 1.01 * (own - true).abs().max()
