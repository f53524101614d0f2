"""Processes whose coefficients are formulas of a continuous time."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.processes.base import NoiseProcess

__all__ = ["EDM", "FlowMatching", "ResidualShift", "TrigFlow"]


class FlowMatching(NoiseProcess):
    """Rectified flow / flow matching: alpha = 1 - t, sigma = t, velocity eps - x0, t in [0, 1].

    ``shift`` k moves grids and time samplers towards noise through ``warp``: t -> k t / (1 + (k - 1) t)
    (SD3, arXiv:2403.03206, Eq. 23). It never changes the path itself, so a time always means the same noise level.

    Args:
        shift: k > 0; 1 means none, SD3 uses 3, Wan 5.
    """

    t_max = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"FlowMatching(shift={shift}): the shift must be positive (1 means none).")
        self.shift = float(shift)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1.0 - t.double()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return sigma / (alpha + sigma)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.sigmoid(-0.5 * log_snr.double())

    def warp(self, t: Tensor) -> Tensor:
        """Shifted time k t / (1 + (k - 1) t) of an unshifted t in [0, 1]."""
        t = t.double()
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def prior_std(self, t_init: float) -> float:  # noqa: D102
        return float(t_init)


class EDM(NoiseProcess):
    """Variance-exploding process of EDM (arXiv:2206.00364): alpha = 1, sigma = t, native time is sigma itself.

    Args:
        sigma_min: smallest noise level used by grids and samplers.
        sigma_max: noise level of the prior, equals ``t_max``.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.t_max = float(sigma_max)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-0.5 * log_snr.double())

    def network_time(self, t: Tensor) -> Tensor:  # noqa: D102
        return 250.0 * t.double().log()

    def prior_std(self, t_init: float) -> float:  # noqa: D102
        return float(t_init)


class ResidualShift(NoiseProcess):
    """A path from a sample to a known picture ``low`` with noise (ResShift, arXiv:2307.12348), less its known part.

        z_t = x0 + t (low - x0) + sigma n,     x_t = z_t - t low = (1 - t) x0 + sigma n,     sigma = kappa sqrt(t)

    The shift t low is known wherever the condition is, and a plain process remains: x_t is what samplers carry, z_t
    what a network is shown (``networks.concatenated``, ``residual_shift``). A time is the share t of the shift.

    Args:
        kappa: standard deviation of the noise at t = 1.
        noise: ``sqrt`` (ResShift), or ``linear``, sigma = kappa t; with kappa = 1 that is flow matching from the noisy
            picture.
    """

    t_max = 1.0

    def __init__(self, kappa: float = 2.0, noise: Literal["sqrt", "linear"] = "sqrt") -> None:
        if not kappa > 0 or noise not in ("sqrt", "linear"):
            raise ValueError(f"ResidualShift(kappa={kappa}, noise={noise!r}): kappa > 0, and noise is sqrt or linear.")
        self.kappa = float(kappa)
        self.noise = noise

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1.0 - t.double()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.kappa * (t.double().sqrt() if self.noise == "sqrt" else t.double())

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        if self.noise == "linear":
            return torch.full_like(t, self.kappa, dtype=torch.float64)
        return 0.5 * self.kappa * t.double().rsqrt()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        ratio = self.kappa * torch.exp(0.5 * log_snr.double())  # (1 - t) / sqrt(t), or / t
        if self.noise == "linear":
            return 1.0 / (1.0 + ratio)
        return (2.0 / (ratio + (ratio.square() + 4.0).sqrt())).square()


class TrigFlow(NoiseProcess):
    """TrigFlow (sCM, arXiv:2410.11081): alpha = cos t, sigma = sin t, t in [0, pi/2], for data of unit std."""

    t_max = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.sin(math.pi / 2 - t.double())

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double().sin()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -t.double().sin()

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double().cos()

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return torch.atan2(sigma, alpha)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.atan(torch.exp(-0.5 * log_snr.double()))
