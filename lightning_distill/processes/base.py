"""What every noise process has: coefficients, their derivatives, log-SNR, and the change between two processes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["NoiseProcess", "change_process", "expand"]


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape a coefficient (B,) or () to broadcast over ``like`` (B, ...), in the dtype of ``like``.

    A coefficient with as many dimensions as ``like`` has one value per element already (``streams``).
    """
    coefficient = coefficient.to(device=like.device, dtype=like.dtype)
    if coefficient.ndim in (0, like.ndim):
        return coefficient
    return coefficient.reshape(coefficient.shape[0], *([1] * (like.ndim - 1)))


class NoiseProcess(ABC):
    """A linear Gaussian noise process in its own native time.

    Subclasses give ``alpha, sigma, d_alpha, d_sigma`` and ``t_from_log_snr``. Times are tensors of any shape and dtype;
    results are float64 of the same shape.

    Attributes:
        t_max: native time of (almost) pure noise.
    """

    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean sample at time ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time ``t``."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of ``alpha``."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of ``sigma``."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of ``log_snr``: the native time at which 2 log(alpha/sigma) equals ``log_snr``."""

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The native time with the ratio alpha : sigma; where it can be, differentiable up to both ends.

        Args:
            alpha: factor on the clean sample, >= 0, up to a common factor, float64.
            sigma: factor on the noise, >= 0, same shape.
        """
        return self.t_from_log_snr(2.0 * (alpha.log() - sigma.log()))

    def t_beyond(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """As ``t_from_coefficients``, and a little past ``t_max`` as the schedule goes on, for differences in time."""
        return self.t_from_coefficients(alpha, sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma): +inf at clean data, -inf at pure noise."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy sample x_t = alpha(t) x0 + sigma(t) eps.

        Args:
            x0: clean sample, (B, ...).
            eps: unit Gaussian noise, same shape.
            t: native times, (B,) or ().

        Returns:
            x_t of the same shape and dtype as ``x0``.
        """
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def network_time(self, t: Tensor) -> Tensor:
        """Time as diffusion networks expect it, on the common 0..1000 scale; families rescale it where they differ.

        Default 1000 t (flow matching as in SD3 and Wan). VP gives the scheduler's timestep, EDM 250 ln(sigma)
        (consistency models, arXiv:2303.01469: 1000 * ln(sigma) / 4).
        """
        return 1000.0 * t.double()

    def prior(self, eps: Tensor, t_init: float | None = None) -> Tensor:
        """The input from which a student starts at ``t_init``: ``prior_std`` times eps, the data part left out.

        Students may start below ``t_max`` (SiD at sigma = 2.5, one-step SDXL at index 399); a process without zero
        terminal SNR leaves alpha(t_max) x0 in training inputs, which no sampler has at generation time.

        Args:
            eps: unit Gaussian noise, (B, ...).
            t_init: native start time in (0, t_max]; None means ``t_max``.

        Raises:
            ValueError: ``t_init`` lies outside (0, t_max].
        """
        t_init = self.t_max if t_init is None else t_init
        if not 0.0 < t_init <= self.t_max:
            raise ValueError(
                f"start time {t_init} is outside (0, {self.t_max}] of {type(self).__name__}; "
                "give the first entry of the student's time list in the process' native time."
            )
        return self.prior_std(t_init) * eps

    def prior_std(self, t_init: float) -> float:
        """Standard deviation of the starting noise at native time ``t_init``; sigma(t_init) unless overridden."""
        return float(self.sigma(torch.tensor(t_init, dtype=torch.float64)))

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in vars(self).items() if isinstance(v, (int, float, str, bool)))
        return f"{type(self).__name__}({inner})"


def change_process(
    t: Tensor, source: NoiseProcess, target: NoiseProcess, data_scale: float = 1.0, beyond: bool = False
) -> tuple[Tensor, Tensor]:
    """The same noisy sample seen by another process: x'_t' = c x_t, exactly, with the same x0 direction and eps.

    With data divided by ``data_scale`` (the data's std, so that the target process sees unit-variance data), the source
    path is x_t = (alpha s) (x0 / s) + sigma eps. The target time has the same ratio of the two coefficients, and c
    brings both to the target's scale (EDM's preconditioning, arXiv:2206.00364 Table 1, is the case EDM -> TrigFlow).

    Args:
        t: native times of ``source``, any shape.
        source: process of x_t.
        target: process wanted.
        data_scale: s, standard deviation of the data.
        beyond: go on a little past the end of the target's times instead of stopping there, for differences in time.

    Returns:
        t', native times of ``target``, and the factor c = |(alpha', sigma')| / |(alpha s, sigma)|; both float64.
    """
    alpha, sigma = source.alpha(t) * data_scale, source.sigma(t)
    t_new = target.t_beyond(alpha, sigma) if beyond else target.t_from_coefficients(alpha, sigma)
    scale = torch.hypot(target.alpha(t_new), target.sigma(t_new)) / torch.hypot(alpha, sigma)
    return t_new, scale
