"""Identities that every method with scores rests on, to rounding on Gaussians."""

from __future__ import annotations

import pytest
import torch
from gaussians import CASES, PROCESSES, coefficients, denoiser, plane, score

from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.prediction import Prediction

M, S, MU, TAU = -0.5, 1.3, 1.0, 0.7


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def predictions(name, t):
    process = PROCESSES[name][0]
    x_t = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    times = torch.full((9,), t, dtype=torch.float64)
    mixtures = GaussianMixture([[M]], std=S), GaussianMixture([[MU]], std=TAU)
    fake, real = (analytic_denoiser(mixture, process)(x_t, times) for mixture in mixtures)
    return process, x_t, times, fake, real, mixtures


@pytest.mark.parametrize(("name", "t"), CASES)
def test_a_score_is_the_same_from_x0_noise_and_density(name, t):
    process, x_t, times, fake, _, mixtures = predictions(name, t)
    alpha, sigma = coefficients(process, t)
    exact = mixtures[0].score(x_t, times, process)
    close(exact, score(x_t, M, S, alpha, sigma))
    close(fake.score, exact, 1e-9 if alpha < 0.1 else 1e-10)
    close((alpha * fake.x0 - x_t) / sigma**2, exact)
    close(-fake.eps / sigma, exact)
    for kind in ("epsilon", "v_prediction", "flow_prediction"):
        again = Prediction(fake.as_type(kind), x_t, times, process, kind)
        close(again.x0, fake.x0, 1e-9)
        close(again.eps, fake.eps, 1e-9)


@pytest.mark.parametrize(("name", "t"), CASES)
def test_score_differences_in_every_space(name, t):
    """score_F - score_T = (alpha / sigma^2) (y_F - y_T) = (eps_T - eps_F) / sigma;  y_F - y_T ~ t (v_T - v_F)."""
    process, x_t, times, fake, real, mixtures = predictions(name, t)
    alpha, sigma = coefficients(process, t)
    difference = mixtures[0].score(x_t, times, process) - mixtures[1].score(x_t, times, process)
    assert float(difference.abs().max()) > 0.01
    close(alpha / sigma**2 * (fake.x0 - real.x0), difference)
    close((real.eps - fake.eps) / sigma, difference)
    flow = real.flow_prediction - fake.flow_prediction
    close(fake.x0 - real.x0, sigma / (alpha + sigma) * flow)


@pytest.mark.parametrize(("name", "t"), CASES)
def test_the_error_of_an_exact_fake_score_is_orthogonal_to_functions_of_the_noisy_sample(name, t):
    """E[u(x_t) (y_F(x_t) - x)] = 0 for every u, and for no other denoiser."""
    alpha, sigma = coefficients(PROCESSES[name][0], t)
    z, eps, weight = plane()
    x = M + S * z
    x_t = alpha * x + sigma * eps
    error = denoiser(x_t, M, S, alpha, sigma) - x
    wrong = denoiser(x_t, MU, TAU, alpha, sigma) - x
    for u in (torch.ones_like(x_t), x_t, x_t**3, x_t.sin(), (-x_t.square()).exp()):
        scale = float((weight * (u * error).abs()).sum())
        assert abs(float((weight * u * error).sum())) < 1e-10 * max(1.0, scale)
    assert abs(float((weight * wrong).sum())) > 1e-3
