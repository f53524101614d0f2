"""Losses of the recursive flow map and its twin: closed forms, the gradient of the divergence, what robustness does."""

import math

import pytest
import torch
from exact_maps import F64, FLOW, MAPS

from lightning_distill.losses.flow_maps import rcgm_target
from lightning_distill.losses.rcgm import fake_flow_loss, gap_weight, rectification, robust_loss, robust_weight
from lightning_distill.networks.analytic import GaussianMixture


def test_the_robust_weight_is_the_slope_of_barrons_loss():
    c = 0.05
    error = torch.tensor([1e-8, 1e-3, 0.2, 5.0], dtype=F64, requires_grad=True)
    found = torch.autograd.grad((robust_weight(error, c) * error).sum(), error)[0]
    want = torch.autograd.grad((2 * c * ((error / c**2 + 1).sqrt() - 1)).sum(), error)[0]
    torch.testing.assert_close(found, want)
    # quadratic below c, the distance itself above
    assert float(found[0]) == pytest.approx(1 / c, rel=1e-4)
    assert float(found[3]) == pytest.approx(float(5.0**-0.5), rel=1e-3)


def test_gap_weights():
    t = torch.tensor([1.0, 0.7, 0.9], dtype=F64)
    weight = gap_weight(t, torch.tensor([0.0, 0.7, 0.4], dtype=F64))
    want = [1.0, math.tan(math.pi / 2.5) + 1.0, math.tan(0.5 * math.pi / 2.5) + 1.0]
    assert weight.tolist() == pytest.approx(want)
    assert weight[1] == pytest.approx(4.0777, abs=1e-4)


def test_the_loss_is_the_product_of_its_parts():
    u, target = (torch.randn(5, 3, dtype=F64, requires_grad=True) for _ in range(2))
    t, r = torch.linspace(0.3, 0.9, 5, dtype=F64), torch.linspace(0.0, 0.5, 5, dtype=F64)
    error = (u - target).square().mean(1)
    for c in (None, 0.1):
        weight = 1.0 if c is None else robust_weight(error, c)
        loss = robust_loss(u, target, t, r, c)
        assert float(loss.detach()) == pytest.approx(float((gap_weight(t, r) * weight * error).mean().detach()))
        gradients = torch.autograd.grad(loss, (u, target), allow_unused=True)
        assert gradients[1] is None
        assert bool(gradients[0].any())
    assert float(robust_loss(u, u, t, r).detach()) == 0.0


def test_a_robust_loss_goes_to_the_median_of_noisy_targets():
    """Why the fake branch has none: 7 of 10 targets are 0, the others 1."""
    target = (torch.arange(10) < 3).to(F64)[:, None]
    t, r = torch.full((10,), 0.5, dtype=F64), torch.zeros(10, dtype=F64)

    def slope(at, c):
        u = torch.tensor(at, dtype=F64, requires_grad=True)
        return float(torch.autograd.grad(robust_loss(u.expand(10, 1), target, t, r, c), u)[0])

    assert abs(slope(0.3, None)) < 1e-12
    assert slope(0.3, 1e-3) > 0.1
    assert abs(slope(0.0, 1e-6)) < slope(0.3, 1e-3)


@pytest.mark.parametrize("exact", list(MAPS.values()), ids=list(MAPS))
def test_the_recursive_target_of_the_exact_map_has_hardly_a_loss(exact):
    x = torch.randn(4, 2, dtype=F64)
    t = torch.linspace(0.5, 0.95, 4, dtype=F64)
    r = 0.2 * t
    u, v = exact.average(x, t, r), exact.velocity(x, t)
    losses = []
    for h in (0.02, 0.01):
        target = rcgm_target(exact.average, u, x, v, t, r, h, 2, None)
        losses.append(float(robust_loss(u, target, t, r, None)))
    assert losses[1] < 2e-3
    assert losses[0] / losses[1] == pytest.approx(4.0, rel=0.2)
    wrong = rcgm_target(exact.average, u, x, -v, t, r, 0.01, 2, None)
    assert float(robust_loss(u, wrong, t, r, None)) > 100 * losses[1]


# ------------------------------------------------------------------------------------------------ twin branch
def test_the_fake_branch_goes_to_the_velocity_of_the_samples():
    n, generator = 100_000, torch.Generator().manual_seed(0)
    made, eps = (torch.randn(n, 1, dtype=F64, generator=generator) for _ in range(2))
    made, s = 0.5 * made + 1.0, torch.full((n,), 0.4, dtype=F64)
    x = FLOW.add_noise(made, eps, s)
    field = GaussianMixture([[1.0]], std=0.5).velocity(x, s, FLOW)

    def slope(h, shift=0.0):
        a = torch.zeros((), dtype=F64, requires_grad=True)
        return float(torch.autograd.grad(fake_flow_loss(field + shift + a * h, made, eps), a)[0])

    for h in (torch.ones_like(x), x, x.sin()):
        assert abs(slope(h)) < 2e-2
    assert slope(torch.ones_like(x), 0.3) == pytest.approx(0.6, abs=2e-2)


def test_the_velocity_moves_along_the_gradient_of_the_divergence():
    """Student eps - u of a Gaussian N(b, a^2): the mean gradient is s / (1 - s)^2 times that of KL."""
    n, mean, std = 100_000, 0.4, 0.7
    a, b = torch.tensor(1.2, dtype=F64, requires_grad=True), torch.tensor(-0.3, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 1, dtype=F64, generator=generator) for _ in range(2))
    s = torch.full((n,), 0.6, dtype=F64)
    u = z - (a * z + b)
    x = FLOW.add_noise((z - u).detach(), eps, s)
    fake, real = (GaussianMixture([[m]], std=d).velocity(x, s, FLOW) for m, d in ((-0.3, 1.2), (mean, std)))
    found = torch.autograd.grad(rectification(u, fake, real, None), (a, b))
    at = s[:1]
    spread, wanted = (1 - at) ** 2 * a**2 + at**2, (1 - at) ** 2 * std**2 + at**2
    divergence = 0.5 * (spread / wanted + ((1 - at) * (b - mean)) ** 2 / wanted - (spread / wanted).log())
    want = torch.autograd.grad(at / (1 - at) ** 2 * divergence, (a, b), torch.ones(1, dtype=F64))
    for one, other in zip(found, want):
        assert float(one) == pytest.approx(float(other), rel=0.03)


def test_a_limit_keeps_the_zero_and_the_direction():
    u, fake, real = (3.0 * torch.randn(6, 2, dtype=F64, requires_grad=True) for _ in range(3))
    leaf = u.detach().requires_grad_()
    found = torch.autograd.grad(rectification(leaf, fake, real), leaf)[0] * leaf.numel()
    torch.testing.assert_close(found, (fake - real).clamp(-1.0, 1.0).detach())
    assert bool((found.abs() == 1.0).any())
    assert float(rectification(leaf, real, real).detach()) == 0.0
    assert torch.autograd.grad(rectification(leaf, fake, real), fake, allow_unused=True)[0] is None
