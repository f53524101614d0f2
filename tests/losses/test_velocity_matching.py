"""Velocity matching and distillation: zero at the exact map, the gradient of the divergence, what a limit biases."""

import pytest
import torch
from exact_maps import F64, FLOW, MAPS

from lightning_distill.losses.velocity_matching import (
    student_velocity,
    velocity_distillation,
    velocity_matching_target,
)
from lightning_distill.networks.analytic import GaussianMixture
from lightning_distill.tangents import tangent

by_map = pytest.mark.parametrize("exact", list(MAPS.values()), ids=list(MAPS))


def draws(n=4):
    return torch.randn(n, 2, dtype=F64), torch.linspace(0.1, 0.95, n, dtype=F64)


def to_clean(exact):
    """u(x, t), the average velocity to 0."""
    return lambda x, t: exact.average(x, t, torch.zeros_like(t))


@pytest.mark.sparse(2)
@by_map
def test_the_exact_map_is_its_own_target(exact):
    x, t = draws()
    v = exact.velocity(x, t)
    u, du_dt = tangent(to_clean(exact), (x, t), (v, 1.0))
    assert (velocity_matching_target(v, du_dt, t) - u).abs().max() < exact.tolerance
    assert (student_velocity(u, du_dt, t) - v).abs().max() < exact.tolerance
    # the other direction of time, and a derivative at a fixed sample, are noticed
    assert (velocity_matching_target(v, -du_dt, t) - u).abs().max() > 0.05
    fixed = tangent(to_clean(exact), (x, t), (None, 1.0))[1]
    assert (velocity_matching_target(v, fixed, t) - u).abs().max() > 0.05


@by_map
def test_differences_are_of_first_order(exact):
    x, t = draws()
    v, errors = exact.velocity(x, t), []
    for h in (2e-2, 1e-2):
        u, du_dt = tangent(to_clean(exact), (x, t), (v, 1.0), "one_sided", step=h)
        errors.append((velocity_matching_target(v, du_dt, t) - u).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)


def test_a_normalised_derivative_moves_the_solution():
    """A fact about the released code that users should know: with c the exact map has a loss."""
    exact = MAPS["gaussian"]
    x, t = draws()
    v = exact.velocity(x, t)
    u, du_dt = tangent(to_clean(exact), (x, t), (v, 1.0))
    target = velocity_matching_target(v, du_dt, t, norm=0.1)
    length = du_dt.norm(dim=1, keepdim=True)
    torch.testing.assert_close(target, v - t[:, None] * du_dt / (length + 0.1))
    assert (target - u).abs().max() > 0.05
    # nothing but a change of the derivative's length
    assert torch.equal(velocity_matching_target(v, torch.zeros_like(v), t, norm=0.1), v)


def test_samples_move_along_the_gradient_of_the_divergence():
    """Gaussian student N(b, a^2), exact velocities: the mean gradient is that of t / (1 - t) KL in a and b."""
    n, mean, std = 100_000, 0.4, 0.7
    a, b = torch.tensor(1.2, dtype=F64, requires_grad=True), torch.tensor(-0.3, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 1, dtype=F64, generator=generator) for _ in range(2))
    t = torch.full((n,), 0.6, dtype=F64)
    x = a * z + b
    x_t = FLOW.add_noise(x.detach(), eps, t)
    own, real = (GaussianMixture([[m]], std=s).velocity(x_t, t, FLOW) for m, s in ((-0.3, 1.2), (mean, std)))
    found = torch.autograd.grad(velocity_distillation(x, own, real, t), (a, b))

    s = t[:1]
    spread, wanted = (1 - s) ** 2 * a**2 + s**2, (1 - s) ** 2 * std**2 + s**2
    divergence = 0.5 * (spread / wanted + ((1 - s) * (b - mean)) ** 2 / wanted - (spread / wanted).log())
    want = torch.autograd.grad(s / (1 - s) * divergence, (a, b), torch.ones(1, dtype=F64))
    for one, other in zip(found, want):
        assert float(one) == pytest.approx(float(other), rel=0.03)


def test_no_gradient_reaches_velocities():
    x, own, real = (torch.randn(5, 2, dtype=F64, requires_grad=True) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    loss = velocity_distillation(x, own, real, t)
    gradients = torch.autograd.grad(loss, (x, own, real), allow_unused=True)
    assert gradients[1] is None
    assert gradients[2] is None
    torch.testing.assert_close(gradients[0], (t - 1)[:, None] * (own - real).detach() / 10)
    assert float(velocity_distillation(x, real, real, t).detach()) == 0.0
    assert not velocity_matching_target(real, own, t).requires_grad
