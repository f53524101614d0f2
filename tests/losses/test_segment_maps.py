"""Segments, sub-paths, stochastic steps, soft consistency and the experts' terms on Gaussians in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from exact_maps import COV, F64, MEAN
from torch import nn

from lightning_distill.losses.segments import (
    check_segments,
    feature_distance,
    gradient_ratio,
    least_squares_discriminator,
    least_squares_generator,
    segment_stage,
    soft_consistency,
    stochastic_step,
    sub_path,
    temporal_coherence,
)
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map
from lightning_distill.parameterisations import segment_end, segment_start
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving, change_process
from lightning_distill.samplers import transport

MIXTURE = GaussianMixture(MEAN[None], covariances=COV[None])
PROCESSES = [EDM(), FlowMatching(), VariancePreserving(), TrigFlow()]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=["edm", "flow", "vp", "trig"])


def at_level(process, level, n=64):
    return process.t_from_log_snr(-2 * torch.full((n,), level, dtype=F64).log())


def noised(process, t):
    return process.add_noise(MIXTURE.sample(len(t))[0].double(), torch.randn(len(t), 2, dtype=F64), t)


def clean_end(x, t, process):
    return gaussian_flow_map(MEAN, COV, x, t, torch.zeros_like(t), process)


# ------------------------------------------------------------------------------------------------ segments
def test_segments_are_bounded_by_edges_that_belong_to_the_one_below():
    edges = [1.0, 0.7, 0.4]
    t = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.4, 0.1], dtype=F64)
    assert segment_start(t, edges).tolist() == [1.0, 1.0, 0.7, 0.7, 0.4, 0.4]
    assert segment_end(t, edges).tolist() == [0.7, 0.7, 0.4, 0.4, 0.0, 0.0]


def test_stages_and_their_bad_settings():
    updates = [3, 2, 4]
    assert [segment_stage(k, updates) for k in range(11)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert segment_stage(7, []) == 0
    check_segments([8, 4, 2, 1], [1, 1, 1])
    check_segments([4], [])
    for segments in ([8, 3], [2, 4], [4, 4], [], [2, 0]):
        with pytest.raises(ValueError, match="each stage's number divide the one before"):
            check_segments(segments, [1] * (len(segments) - 1))
    with pytest.raises(ValueError, match="with 3 stages it has 2 positive entries"):
        check_segments([4, 2, 1], [5])


def test_least_squares_game():
    """The best discriminator of two outcomes with densities p and q is p / (p + q); the generator wants 1."""
    p, q = torch.tensor([7, 3]), torch.tensor([2, 8])
    logits = (p.double() / (p + q))[:, None].requires_grad_()

    def slope(values):
        loss = least_squares_discriminator(values.repeat_interleave(p, 0), values.repeat_interleave(q, 0))
        return torch.autograd.grad(loss, values)[0]

    assert slope(logits).abs().max() < 1e-12
    assert slope((logits.detach() + 0.1).requires_grad_()).min() > 0.01
    fake = torch.tensor([[0.5], [2.0]], dtype=F64, requires_grad=True)
    assert least_squares_generator(fake).item() == pytest.approx((0.25 + 1.0) / 2)
    torch.testing.assert_close(torch.autograd.grad(least_squares_generator(fake), fake)[0], fake.detach() - 1.0)


# ------------------------------------------------------------------------------------------------ sub-paths
@by_process
def test_a_sub_path_is_a_first_order_step_to_a_time_between(process):
    t, r = at_level(process, 2.0), at_level(process, 0.5)
    x_t = noised(process, t)
    prediction = analytic_denoiser(MIXTURE, process)(x_t, t)
    x_r = transport(prediction, r)
    share = torch.rand(64, dtype=F64)
    x, s = sub_path(x_t, t, x_r, r, share, process)
    torch.testing.assert_close(x, transport(prediction, s), rtol=0, atol=1e-9)
    late, early, between = (change_process(time, process, FlowMatching())[0] for time in (t, r, s))
    torch.testing.assert_close(between, early + share * (late - early), rtol=0, atol=1e-9)
    for end, (point, time) in ((0.0, (x_r, r)), (1.0, (x_t, t))):
        x, s = sub_path(x_t, t, x_r, r, torch.full((64,), end, dtype=F64), process)
        torch.testing.assert_close(x, point, rtol=0, atol=1e-9)
        torch.testing.assert_close(s, time, rtol=0, atol=1e-9)


@by_process
def test_the_residual_of_a_sub_path_grows_from_zero_to_that_of_the_step(process):
    """A tangent leaves the curve as the square of the way: 1 - (1 - gamma)^2 of the whole step's error is left."""
    level, h = 0.9, 0.005
    t, r = at_level(process, level), at_level(process, level - h)
    x_t = noised(process, t)
    x_r = transport(analytic_denoiser(MIXTURE, process)(x_t, t), r)

    def residual(gamma):
        x, s = sub_path(x_t, t, x_r, r, torch.full((64,), gamma, dtype=F64), process)
        return (clean_end(x, s, process) - clean_end(x_r, r, process)).norm().item()

    whole = residual(1.0)
    assert residual(0.0) < 1e-9 * whole + 1e-12
    for gamma in (0.25, 0.5, 0.75):
        assert residual(gamma) / whole == pytest.approx(1 - (1 - gamma) ** 2, rel=0.02)


def test_a_sub_path_is_finite_from_pure_noise():
    process = FlowMatching()
    t, r = torch.ones(4, dtype=F64), torch.full((4,), 0.5, dtype=F64)
    x, s = sub_path(torch.randn(4, 2), t, torch.randn(4, 2), r, torch.full((4,), 0.5, dtype=F64), process)
    assert bool(x.isfinite().all())
    assert s.tolist() == pytest.approx([0.75] * 4)


# ------------------------------------------------------------------------------------------------ stochastic steps
def marginal(process, t):
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return alpha * MEAN, alpha**2 * COV + sigma**2 * torch.eye(2, dtype=F64), alpha, sigma


@by_process
def test_the_mean_of_a_full_step_is_that_of_the_reverse_process(process):
    """eta = 1: E[x_r | x_t] of the joint Gaussian of one x0, whatever the size of the step; a martingale of y."""
    t, r = at_level(process, 2.0), at_level(process, 0.5)
    x_t = noised(process, t)
    teacher = analytic_denoiser(MIXTURE, process)
    prediction = teacher(x_t, t)
    zero = torch.zeros_like(x_t)
    mean_t, cov_t, alpha_t, sigma_t = marginal(process, t[0])
    mean_r, cov_r, alpha_r, sigma_r = marginal(process, r[0])
    joint = alpha_t / alpha_r * cov_r  # x_t = (alpha_t / alpha_r) x_r + independent noise
    want = mean_r + (x_t - mean_t) @ torch.linalg.solve(cov_t, joint)
    mean = stochastic_step(prediction, r, 1.0, zero)
    torch.testing.assert_close(mean, want, rtol=0, atol=1e-9)
    # unbiased: the teacher's prediction at the new point has the mean that it had before
    torch.testing.assert_close(teacher(mean, r).x0, prediction.x0, rtol=0, atol=1e-9)
    # the fresh noise is that of x_r given x_t and x0
    ratio = alpha_t / alpha_r
    spread = (sigma_r**2 - (ratio * sigma_r**2) ** 2 / sigma_t**2) ** 0.5
    noise = stochastic_step(prediction, r, 1.0, torch.ones_like(x_t)) - mean
    torch.testing.assert_close(noise, torch.full_like(x_t, spread), rtol=0, atol=1e-9)
    torch.testing.assert_close(stochastic_step(prediction, r, 0.0, zero + 5.0), transport(prediction, r))
    half = stochastic_step(prediction, r, 0.5, torch.ones_like(x_t)) - stochastic_step(prediction, r, 0.5, zero)
    torch.testing.assert_close(half, 0.5 * noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_steps_keep_the_marginal_law(eta):
    """The covariance of x_r over x_t ~ p_t is that of p_r, up to the solver's error O(1 / steps)."""
    process = FlowMatching()
    teacher = analytic_denoiser(MIXTURE, process)
    start, end = torch.tensor(0.8, dtype=F64), torch.tensor(0.3, dtype=F64)
    errors = []
    for steps in (16, 32, 64):
        grid = torch.linspace(0.8, 0.3, steps + 1, dtype=F64)
        mean, cov = marginal(process, start)[:2]
        for t, r in pairwise(grid):
            # the step is affine in x: its matrix and offset from three points, its noise from a unit
            points = torch.cat([torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
            prediction = teacher(points, t.expand(3))
            out = stochastic_step(prediction, r.expand(3), eta, torch.zeros_like(points))
            fresh = (stochastic_step(prediction, r.expand(3), eta, torch.ones_like(points)) - out)[0, 0]
            matrix = (out[1:] - out[0]).T
            mean, cov = matrix @ mean + out[0], matrix @ cov @ matrix.T + fresh**2 * torch.eye(2, dtype=F64)
        want_mean, want = marginal(process, end)[:2]
        torch.testing.assert_close(mean, want_mean, rtol=0, atol=1e-9)
        errors.append((cov - want).norm().item())
    assert errors[2] < 0.02
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, rel=0.15)


# ------------------------------------------------------------------------------------------------ soft consistency
class Jump(nn.Module):
    """The exact flow map, spoilt by a fault that vanishes at s = t."""

    def __init__(self, process, fault=0.0):
        super().__init__()
        self.process, self.fault = process, nn.Parameter(torch.tensor(fault, dtype=F64))

    def forward(self, x, t, s):
        gap = (self.process.sigma(t) - self.process.sigma(s))[:, None]
        return gaussian_flow_map(MEAN, COV, x, t, s, self.process) + self.fault * gap * (1.0 + x)


@by_process
def test_soft_consistency_is_zero_at_the_exact_map_for_all_targets(process):
    t, u = at_level(process, 2.0), at_level(process, 0.8)
    x_t = noised(process, t)
    x_u = gaussian_flow_map(MEAN, COV, x_t, t, u, process)
    for s in (u, 0.5 * u, torch.zeros_like(u)):
        online, frozen = Jump(process), Jump(process)
        estimate, target = soft_consistency(online, frozen, x_t, t, x_u, u, s)
        torch.testing.assert_close(estimate, clean_end(x_t, t, process), rtol=0, atol=1e-9)
        torch.testing.assert_close(target, estimate, rtol=0, atol=1e-9)
        # a point of another trajectory, or a fault of the online jump, is noticed
        assert (soft_consistency(online, frozen, x_t, t, x_t, u, s)[1] - estimate).norm() > 1.0
        assert (soft_consistency(Jump(process, 0.2), frozen, x_t, t, x_u, u, s)[0] - target).norm() > 0.1


def test_soft_consistency_differentiates_the_online_jump_alone():
    process = FlowMatching()
    t, u, s = (torch.full((64,), v, dtype=F64) for v in (0.9, 0.7, 0.4))
    x_t = noised(process, t)
    x_u = gaussian_flow_map(MEAN, COV, x_t, t, u, process)
    online, frozen = Jump(process, 0.2), Jump(process, 0.1)
    frozen.requires_grad_(False)

    def loss():
        estimate, target = soft_consistency(online, frozen, x_t, t, x_u, u, s)
        assert not target.requires_grad
        return (estimate - target).square().mean()

    slope = torch.autograd.grad(loss(), online.fault)[0].item()
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            online.fault.add_(h)
            ends.append(loss().item())
            online.fault.sub_(h)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    assert abs(slope) > 0.01


def test_gradient_ratio():
    first, other = torch.tensor([4.0, 4.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert gradient_ratio(first, other, 100.0).tolist() == [2.0, 1.0, 0.0, 1.0]
    assert gradient_ratio(torch.ones(1), torch.full((1,), 1e-9), 100.0).tolist() == [100.0]


# ------------------------------------------------------------------------------------------------ experts
def test_temporal_coherence_sees_changes_only():
    video = torch.randn(3, 2, 5, 4, 4, dtype=F64)
    still = torch.randn(3, 2, 1, 4, 4, dtype=F64)
    assert temporal_coherence(video, video + still, 2).abs().max() < 1e-24
    # frames that move by one per frame against a still video: a change of the lag everywhere
    moving = torch.arange(5.0, dtype=F64)[None, None, :, None, None] + still
    for lag in (1, 3):
        torch.testing.assert_close(
            temporal_coherence(moving, still.expand_as(moving), lag), torch.full((3,), lag**2.0).double()
        )
    a, b = torch.randn(2, 1, 1, 4, 1, 1, dtype=F64)
    by_hand = (((a[0, 0, 3] - a[0, 0, 0]) - (b[0, 0, 3] - b[0, 0, 0])) ** 2).item()
    assert temporal_coherence(a, b, 3).item() == pytest.approx(by_hand)
    for lag in (0, 5):
        with pytest.raises(ValueError, match=f"compares frames {lag} apart"):
            temporal_coherence(video, video, lag)
    with pytest.raises(ValueError, match="give videos"):
        temporal_coherence(torch.randn(3, 2), torch.randn(3, 2), 1)


def test_feature_distance_and_its_gradient():
    fake = {"a": torch.randn(4, 3, requires_grad=True), "b": torch.randn(4, 2, 5, 5, requires_grad=True)}
    real = {k: torch.randn_like(v, requires_grad=True) for k, v in fake.items()}
    value = feature_distance(fake, real)
    want = [(fake[k] - real[k]).square().flatten(1).mean(1) for k in fake]
    torch.testing.assert_close(value, (want[0] + want[1]) / 2)
    value.sum().backward()
    assert all(v.grad is None for v in real.values())
    assert all(bool(v.grad.abs().sum() > 0) for v in fake.values())
    assert bool((feature_distance(fake, fake) == 0).all())
