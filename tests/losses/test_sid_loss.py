"""Score identity distillation against the Fisher divergence of two Gaussians, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from gaussians import CASES, PROCESSES, coefficients, denoiser, expected_gradient, leaves, line, score

from lightning_distill.losses.sid import fisher_loss, fisher_weight
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving

M, S, MU, TAU = -0.5, 1.3, 1.0, 0.7


def sid_gradient(process, t, alpha_sid, kind="fisher", fake=(M, S)):
    alpha, sigma = coefficients(process, t)

    def loss(x, x_t, times):
        real, y_f = denoiser(x_t, MU, TAU, alpha, sigma), denoiser(x_t, *fake, alpha, sigma)
        return fisher_loss(x, real, y_f, fisher_weight(kind, x.detach(), real.detach(), times, process), alpha_sid)

    return expected_gradient(loss, M, S, alpha, sigma, t)


def fisher_divergence(mean, std, scores, alpha, sigma):
    """E |score_F - score_T|^2 over the noisy student N(mean, std^2), whose score is that of ``scores``."""
    z, weight = line()
    x_t = alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z
    difference = score(x_t, *scores, alpha, sigma) - score(x_t, MU, TAU, alpha, sigma)
    return (weight * difference.square()).sum()


@pytest.mark.parametrize(("name", "t"), CASES)
def test_one_half_is_the_gradient_of_the_fisher_divergence(name, t):
    process = PROCESSES[name][0]
    mean, std = leaves(M, S)
    value = fisher_divergence(mean, std, (mean, std), *coefficients(process, t))
    want = torch.stack(torch.autograd.grad(value, (mean, std)))
    torch.testing.assert_close(sid_gradient(process, t, 0.5), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "t"), CASES)
def test_one_is_the_gradient_with_the_samples_held_fixed(name, t):
    """Score implicit matching: theta in score_F alone."""
    process = PROCESSES[name][0]
    mean, std = leaves(M, S)
    held = [torch.tensor(v, dtype=torch.float64) for v in (M, S)]
    value = fisher_divergence(*held, (mean, std), *coefficients(process, t))
    want = torch.stack(torch.autograd.grad(value, (mean, std)))
    torch.testing.assert_close(sid_gradient(process, t, 1.0), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("alpha", "want"),
    [(0.5, (-2.49746923, 1.11768006)), (1.0, (-1.7368187, 0.91689921)), (1.2, (-1.43255849, 0.83658687))],
)
def test_numbers_of_an_independent_derivation(alpha, want):
    got = sid_gradient(PROCESSES["flow"][0], 0.6, alpha)
    assert got.tolist() == pytest.approx(want, abs=1e-8)


def test_the_loss_is_linear_in_alpha():
    process = PROCESSES["vp"][0]
    half, one, third = (sid_gradient(process, 0.6, alpha) for alpha in (0.5, 1.0, 1.2))
    torch.testing.assert_close(third, one + 0.4 * (one - half), rtol=1e-10, atol=1e-12)


def test_alpha_one_is_the_product_of_two_differences():
    x, real, fake = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    want = ((real - fake) * (fake - x)).mean()
    torch.testing.assert_close(fisher_loss(x, real, fake, torch.ones(5, 1), 1.0), want)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("kind", ["fisher", "dmd", "kl", "one"])
def test_equal_distributions_have_no_gradient(kind, alpha):
    """Student, fake score and teacher are one Gaussian."""
    process, t = PROCESSES["flow"][0], 0.6
    a, sigma = coefficients(process, t)

    def loss(x, x_t, times):
        y = denoiser(x_t, M, S, a, sigma)
        return fisher_loss(x, y, y.clone(), fisher_weight(kind, x.detach(), y.detach(), times, process), alpha)

    assert float(expected_gradient(loss, M, S, a, sigma, t).abs().max()) == 0.0


def test_gradients_reach_the_sample_and_both_scores_but_not_the_weight():
    x, real, fake = (torch.randn(4, 3, requires_grad=True) for _ in range(3))
    weight = fisher_weight("dmd", x, real, torch.full((4,), 0.5), PROCESSES["flow"][0])
    assert not weight.requires_grad
    assert float(weight[0]) == pytest.approx(1 / float((x[0] - real[0]).detach().abs().mean()))
    got = torch.autograd.grad(fisher_loss(x, real, fake, weight, 1.2), (x, real, fake))
    d = (real - fake).detach()
    torch.testing.assert_close(got[0], -weight * d / 12)
    torch.testing.assert_close(got[1], weight * ((real - x).detach() + d - 2.4 * d) / 12)
    torch.testing.assert_close(got[2], weight * (-(real - x).detach() + 2.4 * d) / 12)
    with pytest.raises(ValueError, match="unknown matching weight 'sim'"):
        fisher_weight("sim", x, real, torch.full((4,), 0.5), PROCESSES["flow"][0])


@pytest.mark.parametrize(
    ("process", "low", "high"),
    [
        (FlowMatching(), 1e-4, 1.0 - 1e-6),
        (VariancePreserving(zero_terminal_snr=True), 1e-3, 1.0 - 1e-6),
        (EDM(1e-3, 1e4), 1e-3, 2e3),
    ],
    ids=["flow", "vp", "edm"],
)
def test_the_divergence_weight_integrates_to_the_divergence_of_clean_samples(process, low, high):
    """KL(N(.3, 1.1^2) || N(1, .7^2)) as the integral of weighted Fisher divergences, in closed form at every time."""
    (b, a), (m, s) = (0.3, 1.1), (1.0, 0.7)
    times = torch.linspace(math.log(low), math.log(high), 20_001, dtype=torch.float64).exp()
    if high < 1.0:  # fine at both ends
        times = torch.cat([times[times < 0.5], 1.0 - times[times < 0.5].flip(0)])
        times = times[times < high]
    alpha, sigma = process.alpha(times), process.sigma(times)
    fake, real = ((alpha * std) ** 2 + sigma**2 for std in (a, s))
    # E over the student's marginal of the squared difference of scores, and of the x0 predictions
    shift, slope = alpha * (b - m) / real, 1.0 / real - 1.0 / fake
    scores = shift**2 + slope**2 * fake
    predictions = (sigma**2 / alpha) ** 2 * scores
    x = torch.zeros(len(times), 1, dtype=torch.float64)
    density = 0.5 * fisher_weight("divergence", x, x, times, process)[:, 0] * predictions
    kl = math.log(s / a) + (a**2 + (b - m) ** 2) / (2 * s**2) - 0.5
    assert float(torch.trapezoid(density, times)) == pytest.approx(kl, rel=3e-3)
