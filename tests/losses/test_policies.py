"""Policies: closed forms, exact posteriors, orders of convergence; imitation: zeros, gradients, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_maps import F64, FLOW

from lightning_distill.losses.policies import imitate, imitation_intervals, teacher_ratio
from lightning_distill.networks.analytic import GaussianMixture
from lightning_distill.policies import (
    GridPolicy,
    MixturePolicy,
    MomentumPolicy,
    exponential_mean,
    grid_weights,
    groups_of,
    initial_offsets,
    make_policy,
    mixture_posterior,
)

MIXTURE = GaussianMixture([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]], std=[0.5, 0.7, 0.6], weights=[1.0, 2.0, 0.5])


def times(*values):
    return torch.tensor(values, dtype=F64)


def exact_policy(x, s):
    """The posterior of the mixture at x_s as a policy."""
    log_joint, z, alpha, _, variance = MIXTURE._components(x, s, FLOW, None)
    gain = alpha * MIXTURE.eigenvalues / variance
    var = MIXTURE.eigenvalues * s.reshape(-1, 1, 1).square() / variance
    return MixturePolicy(MIXTURE.means + gain * z, var, log_joint[..., None], x, s)


# ------------------------------------------------------------------------------------------------ mixture
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_the_posterior_of_a_mixture_is_exact_at_every_later_point(start):
    x, s = torch.randn(7, 2, dtype=F64), torch.full((7,), start, dtype=F64)
    policy = exact_policy(x, s)
    for later in (start, 0.6, 0.3, 0.02):
        t, y = torch.full((7,), later, dtype=F64), torch.randn(7, 2, dtype=F64)
        torch.testing.assert_close(policy.velocity(y, t), MIXTURE.velocity(y, t, FLOW), rtol=1e-9, atol=1e-9)


def test_the_posterior_is_bayes_rule():
    """Weights of a fine lattice of clean samples, times the likelihoods, in one dimension."""
    means, var, log_weights = times(-1.0, 0.5)[None, :, None], times(0.09, 0.25)[None, :, None], times(0.2, -0.3)
    log_weights = log_weights[None, :, None]
    lattice = torch.linspace(-8, 8, 40_001, dtype=F64)
    x_s, s, x_t, t = times(0.7)[:, None], times(0.9), times(0.1)[:, None], times(0.4)
    prior = (-(lattice - means.flatten()[:, None]).square() / (2 * var.flatten()[:, None])).exp()
    prior = (log_weights.flatten().exp() / var.flatten().sqrt()) @ prior
    likelihood = -(x_t - 0.6 * lattice).square() / (2 * 0.16) + (x_s - 0.1 * lattice).square() / (2 * 0.81)
    density = prior * likelihood.flatten().exp()
    want = (density * lattice).sum() / density.sum()
    found = mixture_posterior(means, var, log_weights, x_s, s, x_t, t)
    assert float(found) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.01, 1e-3])
def test_single_precision_is_enough_near_clean_data(t):
    """Precisions grow as 1/t^2; what is left of them must not be rounding."""
    torch.manual_seed(0)
    x_s, apart = torch.randn(64, 4, 2, 2, dtype=F64), 0.2 * torch.randn(64, 8, 1, 1, 1, dtype=F64)
    means = torch.randn(64, 1, 4, 2, 2, dtype=F64) + apart
    x = (1 - t) * means[:, 0] + t * x_s
    given = (means, torch.full((64, 1, 1, 1, 1), 0.0025, dtype=F64), torch.zeros(64, 8, 1, 2, 2, dtype=F64), x_s)
    early, late = torch.full((64,), 0.5, dtype=F64), torch.full((64,), t, dtype=F64)
    exact = MixturePolicy(*given, early).velocity(x, late)
    single = MixturePolicy(*(part.float() for part in given), early).velocity(x.float(), late)
    assert float((single.double() - exact).abs().max()) < 3e-6 / t


def test_channels_are_joint_and_positions_are_not():
    means, log_weights = torch.randn(2, 3, 2, 4, dtype=F64), torch.randn(2, 3, 1, 4, dtype=F64)
    x_s, x_t = (torch.randn(2, 2, 4, dtype=F64) for _ in range(2))
    s, t = times(0.9, 0.8), times(0.5, 0.4)
    var = torch.full((2, 1, 1, 1), 0.3, dtype=F64)
    whole = mixture_posterior(means, var, log_weights, x_s, s, x_t, t)
    for i in range(4):
        part = mixture_posterior(means[..., i], var[..., 0], log_weights[..., i], x_s[..., i], s, x_t[..., i], t)
        torch.testing.assert_close(whole[..., i], part)
    one = mixture_posterior(means[:, :, :1], var, log_weights, x_s[:, :1], s, x_t[:, :1], t)
    assert float((whole[:, :1] - one).abs().max()) > 1e-2


def test_the_policy_of_the_exact_posterior_walks_the_trajectory():
    """Euler of the policy is Euler of the teacher, first order."""
    x, s, r = torch.randn(9, 2, dtype=F64), torch.ones(9, dtype=F64), torch.full((9,), 0.3, dtype=F64)
    want, policy = MIXTURE.flow_map(x, 1.0, 0.3, FLOW), exact_policy(x, s)
    errors = [float((policy.step(x, s, r, n) - want).abs().max()) for n in (32, 64, 128)]
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)
    assert errors[2] < 0.01
    torch.testing.assert_close(policy.average(x, s, s, 3), MIXTURE.velocity(x, s, FLOW))


def test_dropout_and_temperature_change_the_weights_alone():
    x, s, t = torch.randn(3, 2, dtype=F64), times(0.9, 0.9, 0.9), times(0.5, 0.5, 0.5)
    policy = exact_policy(x, s)
    assert policy.dropout(torch.zeros(3, 3), 0.0) is policy
    u = torch.tensor([[0.05, 0.5, 0.5], [0.05, 0.05, 0.05], [0.5, 0.5, 0.5]])
    dropped = policy.dropout(u, 0.1)
    weights = dropped.log_weights.softmax(1)[..., 0]
    whole = policy.log_weights.softmax(1)[..., 0]
    assert weights[0, 0] == 0.0
    torch.testing.assert_close(weights[0, 1:], whole[0, 1:] / whole[0, 1:].sum())
    torch.testing.assert_close(weights[1:], whole[1:])  # where all would go, none does
    assert bool(dropped.velocity(x, t).isfinite().all())
    torch.testing.assert_close(policy.sharpened(times(1.0, 1.0, 1.0)).velocity(x, t), policy.velocity(x, t))
    # components far apart: the mixture to the power 1/T, on a lattice
    lattice = torch.linspace(-6, 6, 20_001, dtype=F64)

    def density(p):
        parts = (-(lattice - p.means[0, :, 0, None]).square() / (2 * p.variance[0, :, 0, None])).exp()
        parts = parts * (p.log_weights[0, :, 0].softmax(0) / p.variance[0, :, 0].sqrt())[:, None]
        total = parts.sum(0)
        return total / total.sum()

    apart = MixturePolicy(
        times(-3.0, 3.0)[None, :, None], torch.full((1, 1, 1), 0.2, dtype=F64).expand(1, 2, 1),
        times(0.4, -0.2)[None, :, None], torch.zeros(1, 1, dtype=F64), times(1.0)
    )  # fmt: skip
    power = density(apart).pow(1 / 0.3)
    torch.testing.assert_close(density(apart.sharpened(times(0.3))), power / power.sum(), rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------------------------------ grid
@pytest.mark.parametrize("kind", ["grid", "polynomial"])
def test_grid_weights_interpolate(kind):
    position = torch.linspace(0, 1, 11, dtype=F64)
    for n in (1, 2, 3, 5):
        weights = grid_weights(position, n, kind)
        torch.testing.assert_close(weights.sum(1), torch.ones(11, dtype=F64))
        nodes = torch.linspace(0, 1, n, dtype=F64) if n > 1 else times(0.5)
        torch.testing.assert_close(grid_weights(nodes, n, kind), torch.eye(n, dtype=F64))
        if n > 1:
            torch.testing.assert_close(weights @ nodes, position)
    cubic = torch.linspace(0, 1, 4, dtype=F64).pow(3)
    off = float((grid_weights(position, 4, kind) @ cubic - position.pow(3)).abs().max())
    assert (off < 1e-12) == (kind == "polynomial")


def test_one_value_is_the_straight_step():
    x, x0 = torch.randn(5, 2, dtype=F64), torch.randn(5, 1, 2, dtype=F64)
    s, r = times(1.0, 0.9, 0.8, 0.7, 0.6), times(0.5, 0.4, 0.1, 0.0, 0.0)
    policy = GridPolicy(x0, s, r)
    straight = r[:, None] / s[:, None] * x + (1 - r / s)[:, None] * x0[:, 0]
    for n in (1, 3, 16):
        torch.testing.assert_close(policy.step(x, s, r, n), straight)


def test_a_grid_follows_a_curve_of_clean_samples():
    """x0(t) of the exact trajectory on a grid: the sample at the end converges at second order in its points."""
    x, s, r = torch.randn(6, 2, dtype=F64), torch.ones(6, dtype=F64), torch.full((6,), 0.4, dtype=F64)
    want, errors = MIXTURE.flow_map(x, 1.0, 0.4, FLOW, num_steps=64), []
    for n in (3, 5, 9):
        values = []
        for t in torch.linspace(0.4, 1.0, n, dtype=F64).tolist():
            y = MIXTURE.flow_map(x, 1.0, t, FLOW, num_steps=64) if t < 1 else x
            values.append(MIXTURE.posterior_mean(y, torch.full((6,), t, dtype=F64), FLOW))
        policy = GridPolicy(torch.stack(values, 1), s, r)
        torch.testing.assert_close(policy.clean(r), values[0])
        torch.testing.assert_close(policy.clean(s), values[-1])
        # Richardson removes the error of Euler's substeps
        a, b = policy.step(x, s, r, 200), policy.step(x, s, r, 400)
        errors.append(float((2 * b - a - want).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.4)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.4)


# ------------------------------------------------------------------------------------------------ momentum
def test_modes_are_integrated_in_closed_form():
    torch.manual_seed(0)
    u, g = torch.randn(4, 3, 2, dtype=F64), 3 * torch.randn(4, 3, 2, dtype=F64)
    g[:, 0], g[0, 1] = 0.0, 1e-9
    policy = MomentumPolicy(u, g, torch.randn(4, 3, 1, dtype=F64), times(1.0, 0.9, 0.8, 0.7))
    t, r, x = times(0.9, 0.7, 0.8, 0.6), times(0.1, 0.3, 0.0, 0.6), torch.randn(4, 2, dtype=F64)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))
    mean = torch.zeros_like(x)
    for node, weight in zip(nodes, weights):
        mean = mean + 0.5 * weight * policy.velocity(x, t - 0.5 * (1 + node) * (t - r))
    torch.testing.assert_close(policy.average(x, t, r), mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(policy.average(x, t, r)[3], policy.velocity(x, t)[3])
    torch.testing.assert_close(policy.step(x, t, r, 1), x - (t - r)[:, None] * mean)
    # two steps are one, since nothing depends on the sample
    middle = 0.5 * (t + r)
    torch.testing.assert_close(policy.step(policy.step(x, t, middle, 1), middle, r, 1), policy.step(x, t, r, 1))
    # a growing mode is faster later, that is at smaller times
    alone = MomentumPolicy(torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1), times(1.0))
    assert float(alone.velocity(x[:1, :1], times(0.5))) == pytest.approx(torch.e, rel=1e-6)


def test_the_exponential_mean_is_smooth():
    z = torch.tensor([-5.0, -1.1e-2, -0.9e-2, 0.0, 1e-5, 0.99e-2, 1.01e-2, 5.0], dtype=F64, requires_grad=True)
    value = exponential_mean(z)
    want = torch.where(z == 0, 1.0, torch.expm1(z) / torch.where(z == 0, 1.0, z))
    torch.testing.assert_close(value, want.detach(), rtol=1e-11, atol=0)
    slope = torch.autograd.grad(value.sum(), z)[0]
    exact = torch.where(z.abs() < 1e-4, 0.5 + z / 3, (z.exp() * (z - 1) + 1) / torch.where(z == 0, 1.0, z).square())
    torch.testing.assert_close(slope, exact.detach(), rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------ from a network
@pytest.mark.parametrize("kind", ["grid", "polynomial", "mixture", "momentum"])
def test_without_extra_outputs_a_policy_is_the_straight_step(kind):
    x, v = torch.randn(4, 2, 3, 3, dtype=F64), torch.randn(4, 2, 3, 3, dtype=F64)
    t, end = times(1.0, 0.9, 0.7, 0.5), times(0.5, 0.3, 0.0, 0.1)
    extra = torch.zeros(4, groups_of(kind, 3), 2, 3, 3, dtype=F64)
    policy = make_policy(kind, 3, v, extra, x, t, end)
    straight = x - (t - end)[:, None, None, None] * v
    off = float((policy.step(x, t, end, 16) - straight).square().mean().sqrt())
    assert off < (0.02 if kind == "mixture" else 1e-12)
    torch.testing.assert_close(policy.velocity(x, t), v)
    offsets = initial_offsets(kind, 3, torch.Generator().manual_seed(0))
    apart = make_policy(kind, 3, v, extra + offsets[None, :, None, None, None], x, t, end)
    torch.testing.assert_close(apart.velocity(x, t), v)
    assert bool(offsets.any()) == (kind in ("mixture", "momentum"))
    if kind == "momentum":  # no mode grows yet
        torch.testing.assert_close(apart.step(x, t, end, 1), straight)


def test_extra_outputs_are_read_in_their_places():
    x, v, t, end = torch.zeros(1, 1), torch.zeros(1, 1), times(0.5), times(0.0)
    extra = torch.tensor([1.0, 2.0, 0.5, -0.5, 0.7])[None, :, None]
    mixture = make_policy("mixture", 2, v, extra, x, t, end)
    assert mixture.means.flatten().tolist() == [-0.5, -1.0]
    assert mixture.log_weights.flatten().tolist() == [0.5, -0.5]
    assert float(mixture.variance) == pytest.approx(torch.tensor(-3.0 + 0.7).exp().square() * 0.25)
    momentum = make_policy("momentum", 2, v, extra, x, t, end)
    assert momentum.velocities.flatten().tolist() == [1.0, 2.0]
    assert momentum.growth.flatten().tolist() == pytest.approx([0.0, 8 * torch.tensor(0.7 / 8).tanh().item()])
    grid = make_policy("grid", 2, v, extra[:, :2], x, t, end)
    # the first value belongs to the end
    assert grid.clean(end).item() == -0.5
    assert grid.clean(t).item() == -1.0
    for kind, k, message in (("tree", 2, "choose one of"), ("mixture", 0, "at least 1"), ("momentum", 1, "at least 2")):
        with pytest.raises(ValueError, match=message):
            groups_of(kind, k)


# ------------------------------------------------------------------------------------------------ imitation
def test_intervals_share_the_span():
    own, theirs, span = torch.rand(500, 4), torch.rand(500, 3), torch.full((500,), 0.6, dtype=F64)
    for ratio in (0.0, 0.3, 1.0):
        policy, teacher = imitation_intervals(own, theirs, span, ratio)
        torch.testing.assert_close(teacher.sum(1), ratio * span)
        torch.testing.assert_close(policy.sum(1), (1 - ratio) * span * own.double().amax(1))
        assert float(policy.min()) >= 0.0
        assert float(teacher.min()) >= 0.0
    assert [teacher_ratio(u, 4) for u in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    assert teacher_ratio(0, 0) == 0.0


def imitation(policy, x, s, ratio=0.0, window=0.0, substeps=64, rolled=None, sign=1.0):
    torch.manual_seed(1)
    span = torch.full_like(s, 0.5 - window)
    steps = imitation_intervals(torch.rand(len(x), 4), torch.rand(len(x), 3), span, ratio)

    def teacher(y, t):
        return sign * MIXTURE.velocity(y, t, FLOW)

    gap = torch.full_like(s, window)
    return imitate(policy, rolled or policy.detach(), teacher, x, s, steps, gap, substeps, substeps)


def test_imitation_is_zero_for_the_exact_policy_alone():
    x, s = torch.randn(20, 2, dtype=F64), torch.ones(20, dtype=F64)
    policy = exact_policy(x, s)
    found = imitation(policy, x, s)
    assert float(found.loss) < 1e-20
    assert bool((found.times.diff(dim=0) <= 0).all())
    assert float(found.times.min()) > 0.5
    # points lie on the policy's trajectory
    for i in range(len(x)):
        want = MIXTURE.flow_map(x[i : i + 1], 1.0, float(found.times[2, i]), FLOW)
        assert float((found.points[2, i] - want[0]).abs().max()) < 0.05
    assert float(imitation(policy, x, s, sign=-1.0).loss) > 0.1
    wrong = MixturePolicy(policy.means, policy.variance, -policy.log_weights, x, s)
    assert float(imitation(wrong, x, s).loss) > 0.01
    # an average over time beside one teacher's velocity: an error of first order in the window
    losses = [float(imitation(policy, x, s, window=w).loss) for w in (0.08, 0.04, 0.02)]
    assert losses[0] / losses[1] == pytest.approx(4.0, rel=0.4)
    assert losses[1] / losses[2] == pytest.approx(4.0, rel=0.3)


def test_the_teacher_walks_its_share():
    x, s = torch.randn(20, 2, dtype=F64), torch.ones(20, dtype=F64)
    still = MomentumPolicy(torch.zeros(20, 2, 2, dtype=F64), torch.zeros(20, 2, 2, dtype=F64),
                           torch.zeros(20, 2, 1, dtype=F64), s)  # fmt: skip
    found = imitation(still, x, s, ratio=1.0)
    assert torch.equal(found.points[0], x)
    assert torch.equal(found.times[0], s)
    step = (found.times[0] - found.times[1])[:, None]
    torch.testing.assert_close(found.points[1], x - step * MIXTURE.velocity(x, s, FLOW))
    alone = imitation(still, x, s, ratio=0.0)
    assert bool((alone.points == x).all())


def test_gradients_reach_the_policy_and_nothing_else():
    """The gradient is that of the velocities at fixed points, by central differences of one parameter."""
    x, s = torch.randn(8, 2, dtype=F64), torch.ones(8, dtype=F64)
    exact = exact_policy(x, s)

    def policy(shift):
        return MixturePolicy(exact.means + shift, exact.variance, exact.log_weights, x, s)

    shift = torch.tensor(0.1, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(imitation(policy(shift), x, s, 0.4, 0.05).loss, shift)[0]
    frozen = policy(shift.detach())
    near = [float(imitation(policy(0.1 + h), x, s, 0.4, 0.05, rolled=frozen).loss) for h in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx((near[0] - near[1]) / 2e-5, rel=1e-6)
    moving = [float(imitation(policy(0.1 + h), x, s, 0.4, 0.05).loss) for h in (1e-5, -1e-5)]
    assert abs(float(slope) - (moving[0] - moving[1]) / 2e-5) > 1e-4
