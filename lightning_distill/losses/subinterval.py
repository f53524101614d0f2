"""Denoising and score matching on a part of the noise levels: from a sample at time u > 0 to a noisier time t.

A student that stops at time u makes samples x_u, not clean ones. They are noised further by the same process,

    x_t = A x_u + S n,     A = alpha_t / alpha_u,     S^2 = sigma_t^2 - A^2 sigma_u^2,     n ~ N(0, I)

so that x_t has the process' law at t whenever x_u has it at u, and the teacher may be asked there. The score of x_t
follows from n alone: score(x_t) = -E[n | x_t] / S (Phased DMD, arXiv:2510.27684; ambient diffusion, arXiv:2305.19256).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distill.prediction import Prediction
from lightning_distill.processes import NoiseProcess, expand

__all__ = [
    "balanced_weight",
    "cps_step",
    "importance_weight",
    "noise_further",
    "subinterval_target",
    "subinterval_weight",
    "transition",
]


def cps_step(prediction: Prediction, r: Tensor, eta: float, n: Tensor) -> Tensor:
    """Coefficient-preserving stochastic step (arXiv:2509.05952): part of the noise is predicted, part is fresh.

        x_r = alpha_r x0 + sigma_r (cos(eta pi/2) eps + sin(eta pi/2) n)

    eta = 0 is the deterministic step and eta = 1 renoising.

    Args:
        prediction: at (x_t, t).
        r: native target times, (B,).
        eta: share of the angle, in [0, 1].
        n: fresh noise, (B, ...).
    """
    angle = 0.5 * math.pi * eta
    eps = math.cos(angle) * prediction.eps + math.sin(angle) * n
    return prediction.process.add_noise(prediction.x0, eps, r)


def transition(u: Tensor, t: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """A and S of the step from time u to time t >= u, float64, shape of ``t``.

    Args:
        u: native start times with alpha_u > 0, (B,) or ().
        t: native end times, (B,).
        process: noise process.
    """
    a = process.alpha(t) / process.alpha(u)
    return a, (process.sigma(t).square() - (a * process.sigma(u)).square()).clamp_min(0.0).sqrt()


def noise_further(x_u: Tensor, u: Tensor, t: Tensor, n: Tensor, process: NoiseProcess) -> Tensor:
    """x_t = A x_u + S n; from u = 0 it is ``process.add_noise``.

    Args:
        x_u: samples at time u, (B, ...).
        u: native times, (B,).
        t: native times, at least u, (B,).
        n: unit Gaussian noise, (B, ...).
        process: noise process.
    """
    a, s = transition(u, t, process)
    return expand(a, x_u) * x_u + expand(s, x_u) * n


def subinterval_target(x_u: Tensor, u: Tensor, t: Tensor, n: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """What a denoiser learns at x_t when no clean sample is known: targets for x0 and eps.

        eps* = (sigma_t / S) n,     x0* = x_u / alpha_u - alpha_t sigma_u^2 / (alpha_u^2 S) n

    E[eps* | x_t] is the noise prediction of the score of x_t, and alpha_t x0* + sigma_t eps* = x_t as for a true pair,
    so that ``denoising_loss`` takes them in every space. From u = 0 they are the clean sample and the noise.

    Args:
        x_u: samples at time u, (B, ...).
        u: native times, (B,).
        t: native times above u, (B,).
        n: the noise in x_t, see ``noise_further``.
        process: noise process.
    """
    _, s = transition(u, t, process)
    alpha_u = process.alpha(u)
    gain = process.alpha(t) * (process.sigma(u) / alpha_u).square() / s
    x0 = expand(1.0 / alpha_u, x_u) * x_u - expand(gain, x_u) * n
    return x0, expand(process.sigma(t) / s, n) * n


def balanced_weight(u: Tensor, t: Tensor, process: NoiseProcess, space_weight: Tensor) -> Tensor:
    """Weight 1 / sqrt(1 + w V) of the error against ``subinterval_target``, w that of the loss' space.

        V = (sigma_u sigma_t / (alpha_u S))^2

    is the variance of x0* where the clean sample and x_t are known, which no critic can take away. Gradients then have
    the size of those of ordinary denoising at every u and in every process. Weights 1 / (1 + w V), for losses of one
    size, would leave hardly anything of what the noisiest samples teach. 1 from u = 0, where the target is the clean
    sample.

    Args:
        u: native times, (B,).
        t: native times, (B,).
        process: noise process.
        space_weight: w of the squared error of x0, (B,); see ``score_matching.space_weight``.

    Returns:
        (B,), float64, in [0, 1].
    """
    square = transition(u, t, process)[1].square()
    spread = space_weight * (process.sigma(u) / process.alpha(u) * process.sigma(t)).square()
    return torch.where(u > 0, (square / (square + spread)).sqrt(), torch.ones_like(square))


def subinterval_weight(u: Tensor, t: Tensor, process: NoiseProcess, limit: float = 10.0) -> Tensor:
    """Weight S^2 min(1 / S^2, limit) of the error against ``subinterval_target``, whose variance grows as 1 / S^2.

    RTDMD's (arXiv:2605.26108, released code), for times in [0, 1]: where S is large it is 1, however large the target's
    variance is. 1 from u = 0, where the target is the clean sample.

    Args:
        u: native times, (B,).
        t: native times, (B,).
        process: noise process.
        limit: largest 1 / S^2.

    Returns:
        (B,), float64, in [0, 1].
    """
    weight = (limit * transition(u, t, process)[1].square()).clamp_max(1.0)
    return torch.where(u > 0, weight, torch.ones_like(weight))


@torch.no_grad()
def importance_weight(x_t: Tensor, x0: Tensor, n: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """Weight that turns samples noised from x_u into samples noised from x0 (TDM, arXiv:2503.06674).

        exp(-|m|^2 / 2) / exp(-|n|^2 / 2),     m = (x_t - alpha_t x0) / sigma_t

    A regression on x0 with it learns the score of noised x0, not that of x_t. Logarithms are summed over the elements,
    so that the weights degenerate in many dimensions. They are relative to each other: those of one sample are 1.

    Args:
        x_t: from ``noise_further``, (B, ...).
        x0: prediction that x_u was made from, (B, ...).
        n: the fresh noise in x_t.
        t: native times, (B,).
        process: noise process.

    Returns:
        (B,), float64, of mean 1 over the batch.
    """
    mixed = (x_t - expand(process.alpha(t), x0) * x0) / expand(process.sigma(t), x0)
    log = 0.5 * (n.double().square() - mixed.double().square()).flatten(1).sum(1)
    return log.softmax(0) * len(log)
