"""f-divergences of two noisy Gaussians: values, gradients and diffusion expansion by exact quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from gaussians import CASES, PROCESSES, coefficients, denoiser, expected_gradient, leaves, line, log_density, score

from lightning_distill.losses.f_divergences import (
    DIVERGENCES,
    divergence,
    expanded_divergence_loss,
    log_ratio,
)
from lightning_distill.losses.score_matching import matching_weight, score_difference
from lightning_distill.losses.sid import fisher_loss, fisher_weight
from lightning_distill.processes import EDM

#: student N(M, S^2) and teacher N(MU, TAU^2); close enough for 1/r and r^2 to have expectations
M, S, MU, TAU = -0.3, 1.0, 0.4, 0.8

WRITTEN_OUT = {
    "rkl": lambda r: -math.log(r),
    "kl": lambda r: r * math.log(r),
    "js": lambda r: r * math.log(r) - (1 + r) * math.log((1 + r) / 2),
    "softened_rkl": lambda r: (1 + r) * math.log((1 + r) / (2 * r)),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "hellinger": lambda r: 2 * (1 - math.sqrt(r)) ** 2,
    "jeffreys": lambda r: (r - 1) * math.log(r),
    "pearson": lambda r: (r - 1) ** 2 / 2,
}
#: h(r) of the table in f-distill (arXiv:2502.15681), up to our factors
WEIGHTS = {
    "rkl": lambda r: 1.0,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": math.sqrt,
    "jeffreys": lambda r: 1 + r,
    "pearson": lambda r: r * r,
}
RATIOS = (0.05, 0.4, 1.0, 1.7, 12.0)


def value(name, mean, std, alpha, sigma):
    """D_f(p_T,t || p_S,t), differentiable in the student's mean and std (and in sigma)."""
    z, weight = line()
    x_t = alpha * mean + (alpha**2 * std**2 + sigma**2) ** 0.5 * z
    u = log_density(x_t, MU, TAU, alpha, sigma) - log_density(x_t, mean, std, alpha, sigma)
    return (weight * divergence(name).f(u)).sum()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_table(name):
    chosen = divergence(name)
    u = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    f, h, slope = chosen.f(u), chosen.weight(u), chosen.slope(u)
    assert f.tolist() == pytest.approx([WRITTEN_OUT[name](r) for r in RATIOS], rel=1e-12, abs=1e-14)
    assert h.tolist() == pytest.approx([WEIGHTS[name](r) for r in RATIOS], rel=1e-12)
    # with u = ln r: f'(u) = r f', and r^2 f'' = f_uu - f_u
    (first,) = torch.autograd.grad(f.sum(), u, create_graph=True)
    second = torch.autograd.grad(first.sum(), u)[0] if first.requires_grad else torch.zeros_like(u)
    torch.testing.assert_close(second - first.detach(), h.detach(), rtol=1e-10, atol=1e-12)
    if h.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(h.sum(), u)[0], slope.detach(), rtol=1e-12, atol=1e-14)
    else:
        assert not slope.any()
    assert bool((h > 0).all())


def test_the_tables_are_complete():
    assert set(WRITTEN_OUT) == set(WEIGHTS) == set(DIVERGENCES)
    assert len(DIVERGENCES) == 8
    with pytest.raises(ValueError, match="divergence 'fkl' is unknown; choose one of rkl, kl, js"):
        divergence("fkl")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_score_difference_is_the_gradient_of_the_divergence(name, case):
    process, t = PROCESSES[case[0]][0], case[1]
    alpha, sigma = coefficients(process, t)
    mean, std = leaves(M, S)
    want = torch.stack(torch.autograd.grad(value(name, mean, std, alpha, sigma), (mean, std)))

    def loss(x, x_t, times):
        real, fake = denoiser(x_t, MU, TAU, alpha, sigma), denoiser(x_t, M, S, alpha, sigma)
        u = log_density(x_t, MU, TAU, alpha, sigma) - log_density(x_t, M, S, alpha, sigma)
        h = divergence(name).weight(u.detach())
        return score_difference(x, real, fake, h * matching_weight("kl", x, real, times, process))

    got = expected_gradient(loss, M, S, alpha, sigma, t)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_noise_lowers_a_divergence_at_the_rate_of_its_expansion(name):
    """De Bruijn: d D_f / d sigma^2 = -1/2 E[h(r) |score_F - score_T|^2] for alpha = 1."""
    variance = torch.tensor(0.49, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(value(name, M, S, 1.0, variance**0.5), variance)
    torch.testing.assert_close(got, -0.5 * expansion(name, *leaves(M, S)).detach(), rtol=1e-10, atol=1e-12)


def expansion(name, mean, std, sigma=0.7):
    """E_{p_S}[ h(r) |score_F - score_T|^2 ] at alpha = 1."""
    z, weight = line()
    x_t = mean + (std**2 + sigma**2).sqrt() * z
    u = log_density(x_t, MU, TAU, 1.0, sigma) - log_density(x_t, mean, std, 1.0, sigma)
    difference = score(x_t, mean, std, 1.0, sigma) - score(x_t, MU, TAU, 1.0, sigma)
    return (weight * divergence(name).weight(u) * difference.square()).sum()


def expanded_gradient(name, through_ratio=True):
    process, sigma = EDM(), 0.7

    def loss(x, x_t, times):
        real, fake = denoiser(x_t, MU, TAU, 1.0, sigma), denoiser(x_t, M, S, 1.0, sigma)
        u = (log_density(x_t, MU, TAU, 1.0, sigma) - log_density(x_t, M, S, 1.0, sigma)).flatten()
        weight = fisher_weight("fisher", x.detach(), real.detach(), times, process)
        return expanded_divergence_loss(x, real, fake, u if through_ratio else u.detach(), weight, name)

    return expected_gradient(loss, M, S, 1.0, sigma, sigma)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_expanded_loss_has_the_gradient_of_the_expansion(name):
    mean, std = leaves(M, S)
    want = torch.stack(torch.autograd.grad(expansion(name, mean, std), (mean, std)))
    torch.testing.assert_close(expanded_gradient(name), want, rtol=1e-9, atol=1e-10)
    if name != "rkl":  # without the ratio's graph it is another gradient
        assert float((expanded_gradient(name, through_ratio=False) - want).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("rkl", (-1.0964054, 0.665433)),
        ("kl", (-0.6306022, -0.1571971)),
        ("js", (-0.3237293, 0.0004492)),
        ("hellinger", (2 * -0.3655767, 2 * 0.0425664)),
        ("jeffreys", (-1.7270076, 0.5082359)),
    ],
)
def test_numbers_of_an_independent_derivation(name, want):
    assert expanded_gradient(name).tolist() == pytest.approx(want, abs=1e-6)


def test_the_reverse_kl_expands_to_the_fisher_divergence():
    x, real, fake = (torch.randn(6, 2, dtype=torch.float64) for _ in range(3))
    weight, u = torch.rand(6, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(
        expanded_divergence_loss(x, real, fake, u, weight, "rkl"), fisher_loss(x, real, fake, weight, 0.5)
    )


def test_ratios_come_from_the_mean_logit_and_are_limited():
    logits = torch.tensor([[1.0, 3.0], [-40.0, 0.0], [60.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    u = log_ratio(logits)
    assert u.tolist() == [2.0, -10.0, 10.0]
    assert u.dtype == torch.float32
    (gradient,) = torch.autograd.grad(u.sum(), logits)
    assert gradient.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_stay_finite_in_float32_at_the_limit(name):
    u = torch.tensor([-10.0, 10.0])
    chosen = divergence(name)
    assert bool(torch.stack([chosen.weight(u), chosen.slope(u), chosen.f(u)]).isfinite().all())
