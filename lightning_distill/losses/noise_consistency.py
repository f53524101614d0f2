"""Noises that depend on a condition to varying degree (NCT, arXiv:2506.19741).

    z_t = sqrt(1 - s_t^2) z + s_t eps,     s_0 = 0,  s_1 = 1

All z_t are unit Gaussian noise, fit for the same generator; what a condition c = C(f(z)) says about z it says less and
less about z_t, and nothing about z_1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distill.processes import expand

__all__ = ["noise_levels", "partly_fresh"]


def noise_levels(intervals: int) -> Tensor:
    """Levels s_0 = 0 < .. < s_N = 1, between which z_t turns by equal angles: s_k = sin(k pi / 2N).

    Args:
        intervals: N, at least 1.

    Returns:
        (N + 1,), float64, both ends exact.
    """
    levels = (torch.arange(intervals + 1, dtype=torch.float64) * (0.5 * math.pi / intervals)).sin()
    levels[-1] = 1.0
    return levels


def partly_fresh(noise: Tensor, fresh: Tensor, level: Tensor) -> Tensor:
    """The noise z_t of a level: unit variance, and covariance sqrt(1 - s^2) with z.

    Args:
        noise: z, unit Gaussian, (B, ...).
        fresh: eps, unit Gaussian and independent, same shape.
        level: s in [0, 1], (B,); exactly z at 0 and eps at 1.
    """
    kept = (1.0 - level.double().square()).clamp_min(0.0).sqrt()
    return expand(kept, noise) * noise + expand(level, noise) * fresh
