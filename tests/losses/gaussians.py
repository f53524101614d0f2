"""Exact expectations over one-dimensional Gaussians in float64, for the tests of the losses."""

from __future__ import annotations

import math

import torch

from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving

PROCESSES = {
    "flow": (FlowMatching(), (0.1, 0.6, 0.95)),
    "vp": (VariancePreserving(), (0.1, 0.6, 0.95)),
    "edm": (EDM(), (0.05, 0.7, 6.0)),
    "trig": (TrigFlow(), (0.1, 0.8, 1.5)),
}
CASES = [(name, t) for name, (_, times) in PROCESSES.items() for t in times]


def line(n=281, width=14.0):
    """Nodes and weights of the standard normal; the trapezoidal rule is exact to rounding for smooth integrands."""
    x = torch.linspace(-width, width, n, dtype=torch.float64)
    weight = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi) * (2 * width / (n - 1))
    return x, weight


def plane(n=281):
    """Nodes (z, eps), each (N, 1), and weights (N, 1) of two independent standard normals."""
    x, weight = line(n)
    z, eps = torch.meshgrid(x, x, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(weight, weight).reshape(-1, 1)


def coefficients(process, t):
    """Alpha and sigma at a time, as numbers."""
    time = torch.tensor(t, dtype=torch.float64)
    return float(process.alpha(time)), float(process.sigma(time))


def denoiser(x_t, mean, std, alpha, sigma):
    """E[x0 | x_t] for data N(mean, std^2)."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x_t - alpha * mean)


def score(x_t, mean, std, alpha, sigma):
    """Of data N(mean, std^2) at a noise level."""
    return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def log_density(x_t, mean, std, alpha, sigma):
    """Of data N(mean, std^2) at a noise level; up to the constant -ln(2 pi) / 2."""
    variance = alpha**2 * std**2 + sigma**2
    return -0.5 * (x_t - alpha * mean) ** 2 / variance - 0.5 * torch.as_tensor(variance, dtype=torch.float64).log()


def leaves(*values):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def expected_gradient(loss_of, mean, std, alpha, sigma, t):
    """Gradient in (mean, std) of the expectation of a loss over the student x = mean + std z and its noisy version.

    Args:
        loss_of: maps x, x_t (both with graph) and the times to a loss that is a mean over the elements.
        mean: of the student.
        std: of the student.
        alpha: at the time.
        sigma: at the time.
        t: time.
    """
    z, eps, weight = plane()
    x = (mean + std * z).requires_grad_()
    loss = loss_of(x, alpha * x + sigma * eps, torch.full((len(z),), t, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, x)
    gradient = gradient * x.numel() * weight
    return torch.stack([gradient.sum(), (gradient * z).sum()])
